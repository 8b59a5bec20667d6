"""What a training method is, and what it sees of one step.

A method turns a step's logits and labels into one number to be made smaller; the loop knows no more of it. What it
gives depends on the lesson alone, so that a training goes on after an interruption as it would have.

Shapes: B = batch, C = classes, E = exits, G = gates.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from offramp_models.gates import GatedPass, Relaxation
from offramp_models.training.settings import TrainingSettings


@dataclass(frozen=True, slots=True)
class GatedLesson:
    """What a method sees, besides, of a network with gates.

    Attributes:
        passed: The step's pass, all float32.
        costs_G: Share of the network's FLOPs that each gated body takes.
        rehearse: Gives another pass of the same images, as the network would serve them (no gradient, running
            statistics as they are), with the gates deciding as they are told.
    """

    passed: GatedPass
    costs_G: Sequence[float]
    rehearse: Callable[[Relaxation], GatedPass]


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a method sees of one step.

    Attributes:
        logits_EBC: One tensor of raw scores per exit, float32, shape (B, C), the earliest first.
        labels_B: The right classes, int64, shape (B,).
        progress: The share of the training that is done, from 0 up to 1.
        gated: The rest of what is known of a network with gates; None for one without.
    """

    logits_EBC: Sequence[torch.Tensor]
    labels_B: torch.Tensor
    progress: float
    gated: GatedLesson | None = None


class Method(ABC):
    """Gives a step's loss: a scalar that gradients flow back from.

    Args:
        settings: The training's settings, of which it takes its own.
    """

    needs_gates: ClassVar[bool] = False
    """Whether it is for networks with gates only."""

    def __init__(self, settings: TrainingSettings) -> None:
        self.settings = settings

    def relaxation(self, progress: float, num_gates: int) -> Relaxation | None:
        """Say how gates are to decide at this point of the training; None: as the settings or the network say.

        Args:
            progress: The share of the training that is done, from 0 up to 1.
            num_gates: How many gates the network has.
        """
        return None

    @abstractmethod
    def __call__(self, lesson: Lesson) -> torch.Tensor:
        """Give the loss."""


def gated(lesson: Lesson) -> GatedLesson:
    """Give what a lesson says of its network's gates.

    Raises:
        ValueError: If the network has none.
    """
    if lesson.gated is None:
        raise ValueError("this training method is for networks with gates")
    return lesson.gated
