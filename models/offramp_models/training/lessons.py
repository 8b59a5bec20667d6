"""One step of learning: from some images, through the network, to a loss and weights that changed.

Shapes: B = batch, C = classes, E = exits, G = gates.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from offramp_models.data import ImageDataSet, LabelledImages
from offramp_models.gates import GatedPass, Relaxation, relaxation
from offramp_models.networks.gated_network import GatedNetwork
from offramp_models.training.checkpoint import TrainingState
from offramp_models.training.method import GatedLesson, Lesson, Method
from offramp_models.training.methods import create_method
from offramp_models.training.settings import TrainingSettings


@dataclass(frozen=True, slots=True)
class Learnt:
    """What came of one step.

    Attributes:
        loss: The step's loss.
        decisions_BG: How the gates decided; None for a network without.
    """

    loss: float
    decisions_BG: torch.Tensor | None


class Lessons:
    """Makes batches into steps.

    Args:
        network: What learns.
        data: What it learns from.
        settings: The knobs.

    Raises:
        ValueError: If there is no such method or relaxation, or they are for gates and the network has none.
    """

    def __init__(self, network: nn.Module, data: ImageDataSet, settings: TrainingSettings) -> None:
        self._data, self._settings = data, settings
        self._method: Method = create_method(settings)
        asked = self._method.needs_gates or settings.gate_relaxation
        if asked and not isinstance(network, GatedNetwork):
            what = f"training method {settings.method!r}" if self._method.needs_gates else "gate_relaxation"
            raise ValueError(f"{what} is for networks with gates; {type(network).__name__} has none")
        own = network.relaxation if isinstance(network, GatedNetwork) else "straight_through"
        self._relaxation = relaxation(settings.gate_relaxation or own)

    def learn(self, state: TrainingState, rows_B: npt.NDArray[np.intp], progress: float) -> Learnt:
        """Take one step on some of the training images."""
        batch = self._data.train.rows(rows_B)
        batch = LabelledImages(self._data.augmentation.vary(batch.pixels_NHW, state.random), batch.labels_N)
        images_BDHW = torch.from_numpy(self._data.inputs(batch))
        images_BDHW = images_BDHW.to(self._settings.device, memory_format=memory_format(self._settings))
        labels_B = torch.from_numpy(batch.labels_N).to(self._settings.device)
        lesson = self._lesson(state.network, images_BDHW, labels_B, progress)
        loss = self._method(lesson)
        state.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        state.optimizer.step()
        state.schedule.step()
        return Learnt(loss.item(), None if lesson.gated is None else lesson.gated.passed.decisions_BG.detach())

    def _lesson(self, network: nn.Module, images_BDHW: torch.Tensor, labels_B: torch.Tensor, progress: float) -> Lesson:
        if not isinstance(network, GatedNetwork):
            with self._autocast():
                logits_EBC = network(images_BDHW)
            return Lesson([logits_BC.float() for logits_BC in logits_EBC], labels_B, progress)

        def send(relax: Relaxation) -> GatedPass:
            with self._autocast():
                return network.pass_gates(images_BDHW, relax).in_float32()

        @torch.no_grad()
        def rehearse(relax: Relaxation) -> GatedPass:
            network.eval()
            passed = send(relax)
            network.train()
            return passed

        passed = send(self._method.relaxation(progress, len(network.gate_costs_G)) or self._relaxation)
        return Lesson(passed.logits_EBC, labels_B, progress, GatedLesson(passed, network.gate_costs_G, rehearse))

    def _autocast(self) -> AbstractContextManager[None]:
        device_type = torch.device(self._settings.device).type
        return torch.autocast(device_type, torch.bfloat16, enabled=self._settings.bfloat16)


def memory_format(settings: TrainingSettings) -> torch.memory_format:
    """Give how the training's images and weights lie in memory."""
    return torch.channels_last if settings.bfloat16 else torch.preserve_format
