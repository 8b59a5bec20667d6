"""Training methods: what several exits' logits say about how the weights should change.

A method turns a step's logits and labels into one number to be made smaller; the loop knows no more of it. What it
gives depends on the lesson alone, so that a training goes on after an interruption as it would have.

Shapes: B = batch, C = classes, E = exits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import torch

from offramp_models.lookup import look_up
from offramp_models.training.losses import weighted_loss


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a method sees of one step.

    Attributes:
        logits_EBC: One tensor of raw scores per exit, float32, shape (B, C), the earliest first.
        labels_B: The right classes, int64, shape (B,).
        progress: The share of the training that is done, from 0 up to 1.
    """

    logits_EBC: Sequence[torch.Tensor]
    labels_B: torch.Tensor
    progress: float


Method: TypeAlias = Callable[[Lesson], torch.Tensor]
"""Gives a step's loss: a scalar that gradients flow back from."""
MakeMethod: TypeAlias = Callable[[Sequence[float]], Method]
"""Makes a method, given what each exit counts; nothing: all the same."""


class Weighted:
    """The exits' cross-entropies summed, each with its own weight (survey eq. 18).

    Args:
        exit_weights: What each exit's loss counts; empty: 1 each.
    """

    def __init__(self, exit_weights: Sequence[float] = ()) -> None:
        self.exit_weights = tuple(exit_weights)

    def __call__(self, lesson: Lesson) -> torch.Tensor:
        """Give the loss.

        Raises:
            ValueError: If there is not one weight per exit.
        """
        weights_E = self.exit_weights or (1.0,) * len(lesson.logits_EBC)
        return weighted_loss(lesson.logits_EBC, lesson.labels_B, weights_E)


METHODS: Mapping[str, MakeMethod] = MappingProxyType({"weighted": Weighted})


def create_method(name: str, exit_weights: Sequence[float] = ()) -> Method:
    """Make a training method.

    Args:
        name: A key of `METHODS`.
        exit_weights: What each exit counts; empty: all the same.

    Raises:
        ValueError: If there is no method of that name; the message lists those there are.
    """
    return look_up(METHODS, "training method", name)(exit_weights)
