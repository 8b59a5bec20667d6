"""The one training loop: joint training of all exits, stochastic gradient descent, a cosine schedule.

For a given seed, number of threads and device it gives the same weights every time.

Shapes: N = images, B = batch, C = classes, E = exits.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from offramp_models.data import ImageDataSet, LabelledImages
from offramp_models.training.losses import weighted_loss

EVALUATION_BATCH = 256


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Every knob of the loop.

    Attributes:
        epochs: Passes over the training images. More: better, slower.
        batch_size: Images per step; the last, smaller batch of an epoch is left out.
        learning_rate: At the first step; falls to 0 along half a cosine.
        momentum: Nesterov's.
        weight_decay: Pull of all weights towards 0.
        exit_weights: What each exit's loss counts; empty: all the same.
        seed: Decides the order of the images.
        device: Where it runs: `cpu`, `cuda`, `cuda:1`.
    """

    epochs: int = 6
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    exit_weights: tuple[float, ...] = ()
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Step:
    """Where training stands: `index` of `total` steps, both counted from 1, and the loss of that step."""

    index: int
    total: int
    loss: float


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """What was done and what came of it; goes into the bundle's manifest.

    Attributes:
        data: Name of the data set.
        settings: The loop's settings.
        seconds: How long it took.
        test_accuracy_E: Accuracy of each exit on the test images.
    """

    data: str
    settings: TrainingSettings
    seconds: float
    test_accuracy_E: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Give it as plain JSON values."""
        return asdict(self)


def train(
    network: nn.Module,
    data: ImageDataSet,
    settings: TrainingSettings = TrainingSettings(),
    on_step: Callable[[Step], None] | None = None,
) -> TrainingRecord:
    """Fit a network's weights in place and leave it in evaluation mode.

    Args:
        network: `forward` returns every exit's logits, the earliest first.
        data: What to learn from.
        settings: The knobs.
        on_step: Is told after every step.

    Raises:
        ValueError: If there are fewer training images than a batch holds, or not one loss weight per exit.
    """
    started_s = time.monotonic()
    network.to(settings.device).train()
    images_N, labels_N = _tensors(data, data.train, settings.device)
    total = settings.epochs * (len(labels_N) // settings.batch_size)
    if not total:
        raise ValueError(f"{len(labels_N)} training images do not fill a batch of {settings.batch_size}")
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    for index, rows_B in enumerate(_batches(len(labels_N), settings), start=1):
        logits_EBC = network(images_N[rows_B])
        loss = weighted_loss(logits_EBC, labels_N[rows_B], settings.exit_weights or [1.0] * len(logits_EBC))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(Step(index, total, loss.item()))
    test_accuracy_E = evaluate(network, data, data.test)
    return TrainingRecord(data.name, settings, time.monotonic() - started_s, test_accuracy_E)


@torch.inference_mode()
def evaluate(network: nn.Module, data: ImageDataSet, images: LabelledImages) -> tuple[float, ...]:
    """Measure the accuracy of every exit, all run to the end; leaves the network in evaluation mode."""
    network.eval()
    device = next(network.parameters()).device
    images_N, labels_N = _tensors(data, images, str(device))
    correct_E: list[int] = []
    for rows_B in _pieces(torch.arange(len(labels_N), device=device), EVALUATION_BATCH):
        hits_E = [int((logits_BC.argmax(1) == labels_N[rows_B]).sum()) for logits_BC in network(images_N[rows_B])]
        correct_E = [a + b for a, b in zip(correct_E or [0] * len(hits_E), hits_E, strict=True)]
    return tuple(correct / len(labels_N) for correct in correct_E)


def _tensors(data: ImageDataSet, images: LabelledImages, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(data.inputs(images)).to(device), torch.from_numpy(images.labels_N).to(device)


def _batches(num_images: int, settings: TrainingSettings) -> Iterator[torch.Tensor]:
    random = np.random.default_rng(settings.seed)
    whole = num_images // settings.batch_size * settings.batch_size
    for _ in range(settings.epochs):
        order_N = torch.from_numpy(random.permutation(num_images)[:whole]).to(settings.device)
        yield from _pieces(order_N, settings.batch_size)


def _pieces(rows_N: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    pieces: tuple[torch.Tensor, ...] = torch.split(rows_N, size)
    return pieces
