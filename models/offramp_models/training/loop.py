"""The one training loop: joint training of all exits and gates, stochastic gradient descent, a cosine schedule.

For a given seed, number of threads and device it gives the same weights every time, interrupted or not.

Shapes: N = images, B = batch, C = classes, E = exits, G = gates.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from offramp_models.data import ImageDataSet, LabelledImages
from offramp_models.networks.gated_network import GatedNetwork
from offramp_models.training.checkpoint import Done, TrainingState
from offramp_models.training.evaluation import gate_use, measure
from offramp_models.training.lessons import Learnt, Lessons, memory_format
from offramp_models.training.settings import DEFAULT_SETTINGS, Epoch, Step, TrainingRecord, TrainingSettings


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a training is kept, so that it can go on after an interruption.

    Attributes:
        path: The file; written behind every epoch.
        resume: Go on from what is there.
    """

    path: Path
    resume: bool = False


def train(
    network: nn.Module,
    data: ImageDataSet,
    settings: TrainingSettings = DEFAULT_SETTINGS,
    on_step: Callable[[Step], None] | None = None,
    *,
    on_epoch: Callable[[Epoch], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> TrainingRecord:
    """Fit a network's weights in place and leave it in evaluation mode.

    Args:
        network: `forward` returns every exit's logits, the earliest first.
        data: What to learn from.
        settings: The knobs.
        on_step: Is told after every step.
        on_epoch: Is told after every epoch, when its checkpoint is written.
        checkpoint: Where to keep the training; None: nowhere.

    Raises:
        ValueError: If there are fewer training images than a batch holds, there is no such method, not one loss weight
            per exit, or the checkpoint is not this training's.
    """
    started_s = time.monotonic()
    network.to(settings.device, memory_format=memory_format(settings))  # type: ignore[call-overload] # stubs lack it
    network.train()
    steps_per_epoch = len(data.train) // settings.batch_size
    if not steps_per_epoch:
        raise ValueError(f"{len(data.train)} training images do not fill a batch of {settings.batch_size}")
    lessons = Lessons(network, data, settings)
    total = settings.epochs * steps_per_epoch
    with _random_state(settings):
        state = _start(network, total, settings)
        before = Done()
        if checkpoint is not None and checkpoint.resume:
            before = state.load(checkpoint.path, data.name, settings)
        for epoch in range(before.epochs, settings.epochs):
            epoch_started_s, learnt = time.monotonic(), []
            for index, rows_B in enumerate(_batches(state.random, data.train, settings), epoch * steps_per_epoch + 1):
                learnt.append(lessons.learn(state, rows_B, (index - 1) / total))
                if on_step is not None:
                    on_step(Step(index, total, learnt[-1].loss))
            if checkpoint is not None:
                done = Done(epoch + 1, before.seconds + time.monotonic() - started_s)
                state.save(checkpoint.path, done, data.name, settings)
            if on_epoch is not None:
                seconds = time.monotonic() - epoch_started_s
                on_epoch(_epoch(epoch + 1, settings.epochs, seconds, network, learnt))
    measured = measure(network, data, data.test)
    seconds = before.seconds + time.monotonic() - started_s
    return TrainingRecord(data.name, settings, seconds, measured.accuracy_E, measured.gates)


def _epoch(index: int, total: int, seconds: float, network: nn.Module, learnt: Sequence[Learnt]) -> Epoch:
    gates = None
    if isinstance(network, GatedNetwork):
        gates = gate_use(network, torch.cat([step.decisions_BG for step in learnt if step.decisions_BG is not None]))
    return Epoch(index, total, float(np.mean([step.loss for step in learnt])), seconds, gates)


def _start(network: nn.Module, total: int, settings: TrainingSettings) -> TrainingState:
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    return TrainingState(network, optimizer, schedule, np.random.default_rng(settings.seed))


def _batches(
    random: np.random.Generator, images: LabelledImages, settings: TrainingSettings
) -> Iterator[npt.NDArray[np.intp]]:
    order_N = random.permutation(len(images))
    whole = len(images) // settings.batch_size * settings.batch_size
    for first in range(0, whole, settings.batch_size):
        yield order_N[first : first + settings.batch_size]


@contextmanager
def _random_state(settings: TrainingSettings) -> Iterator[None]:
    """Seed what networks and methods draw from (dropout), and put the caller's state back."""
    device = torch.device(settings.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        yield
