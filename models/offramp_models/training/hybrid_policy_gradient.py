"""SkipNet's way to train gates: supervised first, then with a policy gradient beside the supervised one.

Shapes: B = batch, G = gates in the order in which they decide.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from offramp_models.gates import HARD, GatedPass, Relaxation, Sampled
from offramp_models.training.losses import weighted_loss, weighted_losses_of_rows
from offramp_models.training.method import GatedLesson, Lesson, Method, gated
from offramp_models.training.reinforce import reinforce_loss

SUPERVISED_SHARE = 0.5
"""Of the training; what follows draws decisions and rewards them."""


class HybridPolicyGradient(Method):
    """The exits' loss through relaxed gates, later through drawn ones that a policy gradient teaches (SkipNet).

    Both parts make the same smaller: the loss plus `gate_weight` times the share of FLOPs that gates opened for, whose
    weight grows in the first part, so that blocks learn something before they are dear. In the second a decision's
    reward is minus the row's loss, minus the cost of its gate and the later ones, less what the decisions that serve
    would get (https://arxiv.org/abs/1711.09485, section 3.2 and algorithm 1).
    """

    needs_gates: ClassVar[bool] = True

    def relaxation(self, progress: float, num_gates: int) -> Relaxation | None:
        """Say how gates decide: relaxed in the first part, drawn in the second."""
        return None if progress < SUPERVISED_SHARE else Sampled()

    def __call__(self, lesson: Lesson) -> torch.Tensor:
        """Give the loss."""
        seen = gated(lesson)
        ramp = min(1.0, lesson.progress / SUPERVISED_SHARE)
        loss = weighted_loss(lesson.logits_EBC, lesson.labels_B, self.settings.exit_weights)
        loss = loss + ramp * self._costs_BG(seen, seen.passed)[:, 0].mean()
        if seen.passed.log_probs_BG is None:
            return loss
        rewards_BG = self._rewards_BG(lesson, seen, seen.passed)
        as_served_BG = self._rewards_BG(lesson, seen, seen.rehearse(HARD))
        policy_loss = reinforce_loss(seen.passed.log_probs_BG, rewards_BG, as_served_BG)
        return loss + (policy_loss - policy_loss.detach())  # its gradient counts, its value says nothing

    def _rewards_BG(self, lesson: Lesson, seen: GatedLesson, passed: GatedPass) -> torch.Tensor:
        losses_B = weighted_losses_of_rows(passed.logits_EBC, lesson.labels_B, self.settings.exit_weights)
        return -losses_B[:, None] - self._costs_BG(seen, passed)

    def _costs_BG(self, seen: GatedLesson, passed: GatedPass) -> torch.Tensor:
        return self.settings.gate_weight * costs_to_come(passed.decisions_BG, seen.costs_G)


def costs_to_come(decisions_BG: torch.Tensor, costs_G: Sequence[float]) -> torch.Tensor:
    """Give what each gate and those behind it opened for, as a share of the network's FLOPs."""
    spent_BG = decisions_BG * torch.tensor(costs_G, dtype=decisions_BG.dtype, device=decisions_BG.device)
    return spent_BG.flip(1).cumsum(dim=1).flip(1)
