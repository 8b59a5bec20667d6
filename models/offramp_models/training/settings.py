"""What decides a training, and what is reported and recorded of it.

Shapes: E = exits, G = gates.
"""

from dataclasses import asdict, dataclass
from typing import Any, Final

MAX_GATE_WEIGHT = 1000.0
"""A weight that leaves the classification loss no say is a mistake."""


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
        gate_relaxation: How gates decide while they learn, one of `RELAXATIONS`; empty: as the network's paper does.
        gate_target: The share of images that each gate is to open for, or of FLOPs that are to run, where the method
            has such a target. Higher: more accurate, slower.
        gate_weight: What the gates' part of the loss, or the cost of open gates, counts beside the classification
            loss. Higher: closer to the target, or cheaper; less accurate.

    Raises:
        ValueError: If a gate's target is no share, or the weight is below 0 or beyond reason.
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
    gate_relaxation: str = ""
    gate_target: float = 0.6
    gate_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.gate_target <= 1:
            raise ValueError(f"gate_target must be a share from 0 to 1; got {self.gate_target}")
        if not 0 <= self.gate_weight <= MAX_GATE_WEIGHT:
            raise ValueError(f"gate_weight must be from 0 to {MAX_GATE_WEIGHT:g}; got {self.gate_weight}")


DEFAULT_SETTINGS: Final = TrainingSettings()


@dataclass(frozen=True, slots=True)
class Step:
    """Where training stands: `index` of `total` steps, both counted from 1, and the loss of that step."""

    index: int
    total: int
    loss: float


@dataclass(frozen=True, slots=True)
class GateUse:
    """How the gates of a network decided on some images.

    Attributes:
        open_share_G: Share of the images that each gate opened for.
        depth: Share of the network's FLOPs that ran, on average.
    """

    open_share_G: tuple[float, ...]
    depth: float

    @property
    def open_share(self) -> float:
        """The share of all decisions that opened a gate."""
        return sum(self.open_share_G) / len(self.open_share_G)


@dataclass(frozen=True, slots=True)
class Epoch:
    """A pass that is done: `index` of `total`, both counted from 1.

    Attributes:
        index: Which.
        total: How many there will be.
        loss: Mean over its steps.
        seconds: How long it took.
        gates: How the gates decided while they learnt; None for a network without.
    """

    index: int
    total: int
    loss: float
    seconds: float
    gates: GateUse | None = None

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
        test_gates: How the gates decided on the test images; None for a network without.
    """

    data: str
    settings: TrainingSettings
    seconds: float
    test_accuracy_E: tuple[float, ...]
    test_gates: GateUse | None = None

    def to_json(self) -> dict[str, Any]:
        """Give it as plain JSON values."""
        return asdict(self)
