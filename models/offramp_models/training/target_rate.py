"""ConvNet-AIG's way to train gates: each is to open for a given share of the images.

Shapes: B = batch, G = gates.
"""

from typing import ClassVar

import torch

from offramp_models.gates import HARD, Relaxation
from offramp_models.training.losses import weighted_loss
from offramp_models.training.method import Lesson, Method, gated

RELAXED_SHARE = 0.5
"""Of the training; then gates decide as they will be served. A gate that only ever drew could keep its rate by chance
alone, with a score of 0.6 for every image, and would be open for all of them once it decides without chance."""


class TargetRate(Method):
    """The exits' loss, and the squared distance of each gate's execution rate from a target (ConvNet-AIG).

    A gate's rate is the mean of its decisions over the batch, so that a gate may tell images apart and still keep it
    (https://arxiv.org/abs/1711.11503, section 3.3). The target is the setting `gate_target`; `gate_weight` is what all
    distances together count.
    """

    needs_gates: ClassVar[bool] = True

    def relaxation(self, progress: float, num_gates: int) -> Relaxation | None:
        """Say how gates decide: relaxed in the first part, hard in the second."""
        return None if progress < RELAXED_SHARE else HARD

    def __call__(self, lesson: Lesson) -> torch.Tensor:
        """Give the loss.

        Raises:
            ValueError: If the decisions pass no gradient.
        """
        passed = gated(lesson).passed
        if passed.log_probs_BG is not None:
            raise ValueError("target_rate learns by the gradient of decisions; sampled ones pass none")
        rates_G = passed.decisions_BG.mean(dim=0)
        off_target = (rates_G - self.settings.gate_target).square().sum()
        loss = weighted_loss(lesson.logits_EBC, lesson.labels_B, self.settings.exit_weights)
        return loss + self.settings.gate_weight * off_target
