"""All that a training needs to go on after an interruption as if there had been none.

A checkpoint is a file of tensors and plain values: reading it runs no code. It appears whole or not at all.
"""

import json
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from offramp_models.training.settings import TrainingSettings


@dataclass(frozen=True, slots=True)
class Done:
    """How far a training has come: passes, and the seconds that they took."""

    epochs: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What changes in the course of a training.

    Attributes:
        network: Its weights and running statistics.
        optimizer: Its momenta.
        schedule: Its place on the cosine.
        random: What order and variations are drawn from; torch's own state is kept beside it.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    random: np.random.Generator

    def save(self, path: Path, done: Done, data: str, settings: TrainingSettings) -> None:
        """Write the state behind an epoch; what was at the path before stays until the new file is whole.

        Args:
            path: Where to.
            done: How far the training has come.
            data: Name of the data set, and
            settings: the training's settings: only the same training can go on from here.
        """
        content = {
            "training": _training(data, settings),
            "epochs_done": done.epochs,
            "seconds": done.seconds,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": json.dumps(self.random.bit_generator.state),  # its numbers have 128 bits
            "torch_random": torch.get_rng_state(),
        }
        write_whole(content, path)

    def load(self, path: Path, data: str, settings: TrainingSettings) -> Done:
        """Put everything back as it was, and say how far the training had come.

        Raises:
            ValueError: If the file is no checkpoint, or one of another network or training; what the
                network holds then is not to be used.
        """
        content = _read(path)
        written, wanted = content["training"], _training(data, settings)
        written = _training(data, TrainingSettings()) | written  # settings younger than the file were at their defaults
        if written != wanted:
            raise ValueError(f"checkpoint {path} is of another training: {_difference(written, wanted)}")
        try:
            self.network.load_state_dict(content["network"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.schedule.load_state_dict(content["schedule"])
            self.random.bit_generator.state = json.loads(content["random"])
            torch.set_rng_state(content["torch_random"].cpu())
            return Done(int(content["epochs_done"]), float(content["seconds"]))
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"checkpoint {path} is not one of a {type(self.network).__name__} like this one") from None


def write_whole(content: Mapping[str, Any], path: Path) -> None:
    """Write tensors to a file that is never seen half written, whatever interrupts it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        unfinished = Path(file.name)
        try:
            torch.save(dict(content), file)
            file.close()
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


_FIELDS = {"training", "epochs_done", "seconds", "network", "optimizer", "schedule", "random", "torch_random"}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        content = None
    if not isinstance(content, dict) or content.keys() != _FIELDS or not isinstance(content["training"], dict):
        raise ValueError(f"{path} is no checkpoint of a training")
    return content


def _training(data: str, settings: TrainingSettings) -> dict[str, Any]:
    kept = {name: value for name, value in asdict(settings).items() if name != "device"}
    return {"data": data} | kept


def _difference(written: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    name = next(name for name in {**written, **wanted} if written.get(name) != wanted.get(name))
    return f"{name} is {written.get(name)!r} there and {wanted.get(name)!r} here"
