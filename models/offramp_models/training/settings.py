"""What decides a training, and what is reported and recorded of it.

Shapes: E = exits.
"""

from dataclasses import asdict, dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Every knob of the loop.

    Attributes:
        epochs: Passes over the training images. More: better, slower.
        batch_size: Images per step; the last, smaller batch of an epoch is left out.
        learning_rate: At the first step; falls to 0 along half a cosine.
        momentum: Nesterov's.
        weight_decay: Pull of all weights towards 0.
        method: One of `METHODS`.
        exit_weights: What each exit's loss counts; empty: all the same.
        seed: Decides the order of the images and how they are varied.
        device: Where it runs: `cpu`, `cuda`, `cuda:1`.
        bfloat16: Compute in 16 bits (weights and loss stay float32), the channels of a pixel side by side. Twice as
            fast on processors that have the instructions, slower on others.
    """

    epochs: int = 6
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    method: str = "weighted"
    exit_weights: tuple[float, ...] = ()
    seed: int = 0
    device: str = "cpu"
    bfloat16: bool = False


DEFAULT_SETTINGS: Final = TrainingSettings()


@dataclass(frozen=True, slots=True)
class Step:
    """Where training stands: `index` of `total` steps, both counted from 1, and the loss of that step."""

    index: int
    total: int
    loss: float


@dataclass(frozen=True, slots=True)
class Epoch:
    """A pass that is done: `index` of `total`, both counted from 1.

    Attributes:
        index: Which.
        total: How many there will be.
        loss: Mean over its steps.
        seconds: How long it took.
    """

    index: int
    total: int
    loss: float
    seconds: float

    @property
    def seconds_left(self) -> float:
        """How long the others take if each takes as long."""
        return (self.total - self.index) * self.seconds


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """What was done and what came of it; goes into the bundle's manifest.

    Attributes:
        data: Name of the data set; with the seed among the settings it names the images that were held out.
        settings: The loop's settings.
        seconds: How long it took, interruptions left out.
        test_accuracy_E: Accuracy of each exit on the test images.
    """

    data: str
    settings: TrainingSettings
    seconds: float
    test_accuracy_E: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Give it as plain JSON values."""
        return asdict(self)
