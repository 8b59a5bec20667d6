"""The one training loop: joint training of all exits, stochastic gradient descent, a cosine schedule.

For a given seed, number of threads and device it gives the same weights every time, interrupted or not.

Shapes: N = images, B = batch, C = classes, E = exits.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from offramp_models.data import ImageDataSet, LabelledImages
from offramp_models.training.checkpoint import Done, TrainingState
from offramp_models.training.methods import Lesson, Method, create_method
from offramp_models.training.settings import DEFAULT_SETTINGS, Epoch, Step, TrainingRecord, TrainingSettings

EVALUATION_BATCH = 256


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
    network.to(settings.device, memory_format=_memory_format(settings))  # type: ignore[call-overload] # stubs lack it
    network.train()
    steps_per_epoch = len(data.train) // settings.batch_size
    if not steps_per_epoch:
        raise ValueError(f"{len(data.train)} training images do not fill a batch of {settings.batch_size}")
    lessons = _Lessons(data, settings, create_method(settings.method, settings.exit_weights))
    total = settings.epochs * steps_per_epoch
    with _random_state(settings):
        state = _start(network, total, settings)
        before = Done()
        if checkpoint is not None and checkpoint.resume:
            before = state.load(checkpoint.path, data.name, settings)
        for epoch in range(before.epochs, settings.epochs):
            epoch_started_s, losses = time.monotonic(), []
            for index, rows_B in enumerate(_batches(state.random, data.train, settings), epoch * steps_per_epoch + 1):
                losses.append(lessons.learn(state, rows_B, (index - 1) / total))
                if on_step is not None:
                    on_step(Step(index, total, losses[-1]))
            if checkpoint is not None:
                done = Done(epoch + 1, before.seconds + time.monotonic() - started_s)
                state.save(checkpoint.path, done, data.name, settings)
            if on_epoch is not None:
                seconds = time.monotonic() - epoch_started_s
                on_epoch(Epoch(epoch + 1, settings.epochs, float(np.mean(losses)), seconds))
    test_accuracy_E = evaluate(network, data, data.test)
    seconds = before.seconds + time.monotonic() - started_s
    return TrainingRecord(data.name, settings, seconds, test_accuracy_E)


@torch.inference_mode()
def evaluate(network: nn.Module, data: ImageDataSet, images: LabelledImages) -> tuple[float, ...]:
    """Measure the accuracy of every exit, all run to the end, in float32; leaves the network in evaluation mode."""
    network.eval()
    device = next(network.parameters()).device
    correct_E: list[int] = []
    for first in range(0, len(images), EVALUATION_BATCH):
        batch = images.rows(slice(first, first + EVALUATION_BATCH))
        labels_B = torch.from_numpy(batch.labels_N).to(device)
        logits_EBC = network(torch.from_numpy(data.inputs(batch)).to(device))
        hits_E = [int((logits_BC.argmax(1) == labels_B).sum()) for logits_BC in logits_EBC]
        correct_E = [a + b for a, b in zip(correct_E or [0] * len(hits_E), hits_E, strict=True)]
    return tuple(correct / len(images) for correct in correct_E)


@dataclass(frozen=True, slots=True)
class _Lessons:
    """Makes batches into steps."""

    data: ImageDataSet
    settings: TrainingSettings
    method: Method

    def learn(self, state: TrainingState, rows_B: npt.NDArray[np.intp], progress: float) -> float:
        """Take one step on some of the training images; gives its loss."""
        batch = self.data.train.rows(rows_B)
        batch = LabelledImages(self.data.augmentation.vary(batch.pixels_NHW, state.random), batch.labels_N)
        device = self.settings.device
        images_BDHW = torch.from_numpy(self.data.inputs(batch))
        images_BDHW = images_BDHW.to(device, memory_format=_memory_format(self.settings))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=self.settings.bfloat16):
            logits_EBC = state.network(images_BDHW)
        labels_B = torch.from_numpy(batch.labels_N).to(device)
        loss = self.method(Lesson([logits_BC.float() for logits_BC in logits_EBC], labels_B, progress))
        state.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        state.optimizer.step()
        state.schedule.step()
        return loss.item()


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


def _memory_format(settings: TrainingSettings) -> torch.memory_format:
    return torch.channels_last if settings.bfloat16 else torch.preserve_format


@contextmanager
def _random_state(settings: TrainingSettings) -> Iterator[None]:
    """Seed what networks and methods draw from (dropout), and put the caller's state back."""
    device = torch.device(settings.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        yield
