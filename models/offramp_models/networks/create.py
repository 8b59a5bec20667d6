"""Which networks there are, and the choices that decide one: what is recorded beside weights, and read back.

A network is a class that can be built without arguments: input shape, classes and exits come first, and what else it
lets a person choose are its keyword-only arguments: `gates`, where there are several kinds of them for it, and knobs. A
knob is a whole number or a row of them.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self, TypeAlias

import torch

from offramp_models.exits import exit_head
from offramp_models.gates import make_gates
from offramp_models.lookup import look_up
from offramp_models.networks.blockdrop import BlockDrop
from offramp_models.networks.convnet_aig import ConvNetAIG
from offramp_models.networks.ddi import DDI
from offramp_models.networks.image_network import ImageNetwork
from offramp_models.networks.layerdrop import LayerDrop
from offramp_models.networks.msdnet import MSDNet
from offramp_models.networks.multi_exit_cnn import MultiExitCNN
from offramp_models.networks.resnet import ResNet
from offramp_models.networks.skipnet import SkipNet
from offramp_models.networks.stochastic_depth import StochasticDepth
from offramp_models.shapes import ImageShape

NETWORKS: Mapping[str, type[ImageNetwork]] = MappingProxyType(
    {
        "blockdrop": BlockDrop,
        "convnet_aig": ConvNetAIG,
        "ddi": DDI,
        "layerdrop": LayerDrop,
        "msdnet": MSDNet,
        "multi_exit_cnn": MultiExitCNN,
        "resnet": ResNet,
        "skipnet": SkipNet,
        "stochastic_depth": StochasticDepth,
    }
)

Knob: TypeAlias = int | tuple[int, ...]
MAX_KNOB = 8192
"""No width, depth or image side is larger: a record that says so is broken."""
MAX_KNOB_LENGTH = 64


@dataclass(frozen=True, slots=True)
class NetworkPlan:
    """All that decides a network but its weights.

    Attributes:
        network: A key of `NETWORKS`.
        exits: A key of `EXITS`.
        input_shape: Channels, height and width of the images.
        num_classes: Classes that it tells apart.
        knobs: Every knob of the network, those left at their defaults too: another default later changes no record.
        gates: A key of `GATES`; None for a network that leaves no choice of gates.
    """

    network: str
    exits: str
    input_shape: ImageShape
    num_classes: int
    knobs: Mapping[str, Knob]
    gates: str | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self | None:
        """Read the plan that a training's record holds; None if it holds none.

        Raises:
            ValueError: If it cannot be what a training wrote; the message names the field.
        """
        if not {"network", "exits", "input_shape", "num_classes"} <= record.keys():
            return None
        shape, knobs = _knob("input_shape", record["input_shape"]), record.get("knobs", {})
        if not isinstance(shape, tuple) or len(shape) != 3:
            raise ValueError(f"input_shape must be channels, height and width; got {record['input_shape']!r}")
        num_classes = _knob("num_classes", record["num_classes"])
        if not isinstance(num_classes, int) or not isinstance(knobs, Mapping):
            raise ValueError("num_classes must be a whole number, and knobs an object of the network's knobs")
        plan = plan_network(
            str(record["network"]),
            exits=str(record["exits"]),
            input_shape=(shape[0], shape[1], shape[2]),
            num_classes=num_classes,
            knobs=knobs,
            gates=None if record.get("gates") is None else str(record["gates"]),
        )
        return cls(plan.network, plan.exits, plan.input_shape, plan.num_classes, plan.knobs, plan.gates)

    def to_json(self) -> dict[str, Any]:
        """Give it as plain JSON values, as `from_record` reads them."""
        gates = {} if self.gates is None else {"gates": self.gates}
        return {
            "network": self.network,
            "exits": self.exits,
            **gates,
            "input_shape": list(self.input_shape),
            "num_classes": self.num_classes,
            "knobs": {name: value if isinstance(value, int) else list(value) for name, value in self.knobs.items()},
        }

    def build(self, seed: int = 0) -> ImageNetwork:
        """Build the network with freshly drawn weights.

        Args:
            seed: Decides the weights; the caller's own random state is left as it was.

        Raises:
            ValueError: If the knobs do not go together, or not with the images.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # Every network's first three arguments are these; the others were checked against its signature.
            make: Any = NETWORKS[self.network]
            gates = {} if self.gates is None else {"gates": self.gates}
            network: ImageNetwork = make(self.input_shape, self.num_classes, self.exits, **gates, **self.knobs)
            return network


def plan_network(
    name: str,
    *,
    exits: str | None = None,
    input_shape: ImageShape | None = None,
    num_classes: int | None = None,
    knobs: Mapping[str, object] = MappingProxyType({}),
    gates: str | None = None,
) -> NetworkPlan:
    """Settle all that decides a network; what is left out is the network's own default.

    Args:
        name: A key of `NETWORKS`.
        exits: A key of `EXITS`.
        input_shape: Channels, height and width of the images.
        num_classes: Classes that it is to tell apart.
        knobs: The network's knobs, by name.
        gates: A key of `GATES`.

    Raises:
        ValueError: If there is no network, no exits, no gates or no knob of that name, the message listing those there
            are; the network leaves no choice of gates; or a knob's value is none.
    """
    defaults = _defaults(look_up(NETWORKS, "network", name))
    first = [defaults.pop(argument) for argument in ("input_shape", "num_classes", "exits")]
    wanted = exits if exits is not None else first[2]
    exit_head(wanted)
    wanted_gates = _gates(name, gates, defaults.pop("gates", None))
    for knob, value in knobs.items():
        if knob not in defaults:
            raise ValueError(f"network {name!r} has no knob {knob!r}; it has {', '.join(sorted(defaults))}")
        given = _knob(knob, value)
        if isinstance(given, int) is not isinstance(defaults[knob], int):
            kind = "one whole number" if isinstance(defaults[knob], int) else "a row of whole numbers"
            raise ValueError(f"{knob} must be {kind}, such as {_written(defaults[knob])}; got {_written(given)}")
        defaults[knob] = given
    return NetworkPlan(
        name,
        wanted,
        first[0] if input_shape is None else input_shape,
        first[1] if num_classes is None else num_classes,
        MappingProxyType(defaults),
        wanted_gates,
    )


def create_network(
    name: str,
    seed: int = 0,
    *,
    exits: str | None = None,
    input_shape: ImageShape | None = None,
    num_classes: int | None = None,
    knobs: Mapping[str, object] = MappingProxyType({}),
    gates: str | None = None,
) -> ImageNetwork:
    """Build a network with freshly drawn weights: `plan_network`, then `NetworkPlan.build`."""
    plan = plan_network(name, exits=exits, input_shape=input_shape, num_classes=num_classes, knobs=knobs, gates=gates)
    return plan.build(seed)


def _defaults(network: type[ImageNetwork]) -> dict[str, Any]:
    parameters = inspect.signature(network).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters}


def _gates(network: str, asked: str | None, default: str | None) -> str | None:
    if asked is None:
        return default
    make_gates(asked)
    if default is None:
        choosing = [name for name, kind in NETWORKS.items() if "gates" in _defaults(kind)]
        raise ValueError(f"network {network!r} leaves no choice of gates; these do: {', '.join(sorted(choosing))}")
    return asked


def _knob(name: str, value: object) -> Knob:
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not 1 <= len(numbers) <= MAX_KNOB_LENGTH:
        raise ValueError(f"{name} must be 1 to {MAX_KNOB_LENGTH} numbers; got {len(numbers)}")
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= MAX_KNOB:
            raise ValueError(f"{name} must be whole numbers from 1 to {MAX_KNOB}; got {number!r}")
    return numbers if isinstance(value, list | tuple) else numbers[0]


def _written(knob: Knob) -> str:
    return str(knob) if isinstance(knob, int) else ",".join(map(str, knob))
