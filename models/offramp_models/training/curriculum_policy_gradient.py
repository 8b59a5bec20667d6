"""BlockDrop's way to train a policy: the blocks come under it one after the other, the last first.

Shapes: B = batch, E = exits, G = gates in the order in which they decide.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from offramp_models.gates import HARD, Choice, GatedPass, Relaxation
from offramp_models.training.losses import weighted_loss
from offramp_models.training.method import Lesson, Method, gated
from offramp_models.training.reinforce import reinforce_loss

BACKBONE_SHARE = 0.4
"""Of the training, with all gates open."""
JOINT_SHARE = 0.3
"""Of the training, at its end; between the two is the curriculum."""
EXPLORATION = 0.8
"""No gate is drawn with a probability above this or below what it leaves of 1 (the paper's alpha)."""


class CurriculumPolicyGradient(Method):
    """The backbone first, then the policy by a self-critical policy gradient, then both (BlockDrop).

    A row's reward for its drawn decisions, less what the policy's own hard decisions would get, praises all of them
    alike. In the curriculum the last block comes under the policy first, the others staying open, then one more at a
    time; the backbone gets no gradient (https://arxiv.org/abs/1711.08393, sections 3.2 and 3.3).
    """

    needs_gates: ClassVar[bool] = True

    def relaxation(self, progress: float, num_gates: int) -> Relaxation | None:
        """Say how gates decide: the first ones are open, the others drawn."""
        return Curriculum(num_gates - num_free(progress, num_gates))

    def __call__(self, lesson: Lesson) -> torch.Tensor:
        """Give the loss."""
        loss = weighted_loss(lesson.logits_EBC, lesson.labels_B, self.settings.exit_weights)
        seen = gated(lesson)
        decisions_BG, log_probs_BG = seen.passed.decisions_BG, seen.passed.log_probs_BG
        free = num_free(lesson.progress, decisions_BG.shape[1])
        if not free or log_probs_BG is None:
            return loss
        drawn = seen.rehearse(Replay(decisions_BG))
        own = seen.rehearse(Curriculum(decisions_BG.shape[1] - free, is_hard=True))
        rewards_B1, baselines_B1 = (
            reward(each, lesson.labels_B, self.settings.gate_weight)[:, None] for each in (drawn, own)
        )
        policy_loss = reinforce_loss(log_probs_BG, rewards_B1, baselines_B1)
        return policy_loss if lesson.progress < 1 - JOINT_SHARE else loss + policy_loss


def num_free(progress: float, num_gates: int) -> int:
    """Give how many gates, from the last, are under the policy at a point of the training."""
    if progress < BACKBONE_SHARE:
        return 0
    through = (progress - BACKBONE_SHARE) / (1 - JOINT_SHARE - BACKBONE_SHARE)
    return min(int(through * num_gates) + 1, num_gates)


def reward(passed: GatedPass, labels_B: torch.Tensor, saving_weight: float) -> torch.Tensor:
    """Give BlockDrop's reward of every row (the paper's eq. 4), shape (B,), divided by its gamma.

    Args:
        passed: What was decided, and answered at the last exit.
        labels_B: The right classes.
        saving_weight: 1/gamma: a wrong answer costs 1, a right one earns this times 1 less the squared share of blocks
            that ran.
    """
    is_right_B = passed.logits_EBC[-1].argmax(dim=1) == labels_B
    saved_B = 1 - passed.decisions_BG.mean(dim=1).square()
    return torch.where(is_right_B, saving_weight * saved_B, -torch.ones_like(saved_B))


@dataclass(frozen=True, slots=True)
class Curriculum:
    """Gates of which the first are kept open and the others under the policy.

    Attributes:
        num_open: How many are kept open.
        is_hard: The others decide as they would serve; else they are drawn.
    """

    num_open: int
    is_hard: bool = False

    def __call__(self, log_odds_B: torch.Tensor, gate_index: int) -> Choice:
        """Decide."""
        if gate_index < self.num_open:
            return Choice(torch.ones_like(log_odds_B), torch.zeros_like(log_odds_B))
        if self.is_hard:
            return HARD(log_odds_B, gate_index)
        score_B = torch.sigmoid(log_odds_B)
        probability_B = EXPLORATION * score_B + (1 - EXPLORATION) * (1 - score_B)
        decision_B = torch.bernoulli(probability_B.detach())
        return Choice(decision_B, torch.where(decision_B > 0.5, probability_B, 1 - probability_B).log())


@dataclass(frozen=True, slots=True)
class Replay:
    """Decides as it was decided before.

    Attributes:
        decisions_BG: What was decided.
    """

    decisions_BG: torch.Tensor

    def __call__(self, log_odds_B: torch.Tensor, gate_index: int) -> Choice:
        """Look up."""
        return Choice(self.decisions_BG[:, gate_index])
