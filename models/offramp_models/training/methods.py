"""Training methods by name: what logits, and decisions at gates, say about how the weights should change.

Shapes: B = batch, C = classes, E = exits.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch

from offramp_models.lookup import look_up
from offramp_models.training.curriculum_policy_gradient import CurriculumPolicyGradient
from offramp_models.training.hybrid_policy_gradient import HybridPolicyGradient
from offramp_models.training.losses import weighted_loss
from offramp_models.training.method import Lesson, Method
from offramp_models.training.resource import Resource
from offramp_models.training.settings import TrainingSettings
from offramp_models.training.target_rate import TargetRate

MakeMethod: TypeAlias = Callable[[TrainingSettings], Method]
"""Makes a method, given a training's settings."""


class Weighted(Method):
    """The exits' cross-entropies summed, each with its own weight (survey eq. 18)."""

    def __call__(self, lesson: Lesson) -> torch.Tensor:
        """Give the loss.

        Raises:
            ValueError: If there is not one weight per exit.
        """
        return weighted_loss(lesson.logits_EBC, lesson.labels_B, self.settings.exit_weights)


METHODS: Mapping[str, MakeMethod] = MappingProxyType(
    {
        "curriculum_policy_gradient": CurriculumPolicyGradient,
        "hybrid_policy_gradient": HybridPolicyGradient,
        "resource": Resource,
        "target_rate": TargetRate,
        "weighted": Weighted,
    }
)


def create_method(settings: TrainingSettings) -> Method:
    """Make the training method that the settings name.

    Raises:
        ValueError: If there is no method of that name; the message lists those there are.
    """
    return look_up(METHODS, "training method", settings.method)(settings)
