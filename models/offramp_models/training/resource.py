"""DDI's way to train gates: the compute of a batch is to meet a budget.

Shapes: B = batch, G = gates.
"""

from typing import ClassVar

import torch

from offramp_models.gates import HARD, Relaxation
from offramp_models.training.losses import weighted_loss
from offramp_models.training.method import GatedLesson, Lesson, Method, gated
from offramp_models.training.target_rate import RELAXED_SHARE


class Resource(Method):
    """The exits' loss, and the distance of a batch's mean compute from a budget (DDI).

    Above the budget the gates are pulled shut and below it open, always as hard: the weight of the compute in the loss
    changes its sign at the budget, as in https://arxiv.org/abs/1907.04523. The budget is the setting `gate_target`, a
    share of the network's FLOPs; `gate_weight` is what the distance counts.
    """

    needs_gates: ClassVar[bool] = True

    def relaxation(self, progress: float, num_gates: int) -> Relaxation | None:
        """Say how gates decide: as they will be served in the second part, whatever the network or the settings say."""
        return None if progress < RELAXED_SHARE else HARD

    def __call__(self, lesson: Lesson) -> torch.Tensor:
        """Give the loss."""
        off_budget = (compute_B(gated(lesson)).mean() - self.settings.gate_target).abs()
        loss = weighted_loss(lesson.logits_EBC, lesson.labels_B, self.settings.exit_weights)
        return loss + self.settings.gate_weight * off_budget


def compute_B(seen: GatedLesson) -> torch.Tensor:
    """Give the share of the network's FLOPs that each row needs, channels that are shut left out, shape (B,)."""
    needed_BG = seen.passed.decisions_BG
    if seen.passed.shares_BG is not None:
        needed_BG = needed_BG * seen.passed.shares_BG
    costs_G = torch.tensor(seen.costs_G, dtype=needed_BG.dtype, device=needed_BG.device)
    return 1 - (1 - needed_BG) @ costs_G
