"""Gates of a program: the mark that each leaves in the graph, and what the program's nodes have to do with them.

A gate is traced to a node `offramp::Gate`, its score in front and its decision behind.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from onnx import NodeProto, defs, helper
from onnx.shape_inference import InferenceContext
from onnxscript.values import Opset

DOMAIN: Final = "offramp"
OPERATOR: Final = "Gate"

_FLOATS: Final = ("tensor(float)", "tensor(float16)", "tensor(double)")


@dataclass(frozen=True, slots=True)
class GateMark:
    """A gate as it was traced.

    Attributes:
        name: What it is called in the bundle.
        score: The value that is compared with the threshold, one number a row.
        decision: The value that holds 1 where it is open, and else 0.
        threshold: The network's own.
    """

    name: str
    score: str
    decision: str
    threshold: float


@dataclass(frozen=True, slots=True)
class PlannedGate:
    """A gate as it will be served.

    Attributes:
        name: What it is called.
        threshold: The network's own.
        score: The value that holds its score; None where that depends on no input.
        priority: The score that depends on no input.
    """

    name: str
    threshold: float
    score: str | None = None
    priority: float | None = None


@dataclass(frozen=True, slots=True)
class MergedValue:
    """A value that gated nodes make, and the one that stands for it where they do not run.

    Attributes:
        run: The value, which all readers read.
        skip: The other.
    """

    run: str
    skip: str


@dataclass(frozen=True, slots=True)
class Gating:
    """What a specialised program's nodes have to do with its gates.

    Attributes:
        gates: In the order in which they decide.
        regions: For the first output of a gated node the gates that must all be open for anybody to need it, the
            outermost first; other nodes are trunk.
        merges: By the name of `run`.
        origins: What was the first output of a node before specialisation, where it is another now.
    """

    gates: tuple[PlannedGate, ...]
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    merges: Mapping[str, MergedValue] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)

    def region(self, node: NodeProto) -> tuple[int, ...]:
        """Give the gates that must all be open for a node to be needed."""
        return self.regions.get(node.output[0], ())


def is_gate(node: NodeProto) -> bool:
    """Tell whether a node is a gate's mark."""
    return bool(node.op_type == OPERATOR and node.domain == DOMAIN)


def marks_of(nodes: Iterable[NodeProto]) -> tuple[GateMark, ...]:
    """Read the gates of a graph, in the order in which they decide; each has a name that no other has."""
    found: dict[str, GateMark] = {}
    for index, node in enumerate(filter(is_gate, nodes)):
        held = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        given = held["name"].decode() or f"gate_{index}"
        name = next(one for one in numbered(given) if one not in found)
        # The shortest decimal number that is this float32: 0.3, not 0.30000001192092896.
        threshold = float(str(np.float32(held["threshold"])))
        found[name] = GateMark(name, node.input[0], node.output[0], threshold)
    return tuple(found.values())


def gate_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Give what `torch.onnx.export` needs to translate gates; nothing where nobody has defined them."""
    if not hasattr(torch.ops.offramp, "gate"):
        return {}
    register_operator()
    return {torch.ops.offramp.gate.default: _translated}


def register_operator() -> None:
    """Tell ONNX what a gate is."""
    if defs.has(OPERATOR, DOMAIN):
        return
    parameter, attribute = defs.OpSchema.FormalParameter, defs.OpSchema.Attribute
    schema = defs.OpSchema(
        OPERATOR,
        DOMAIN,
        1,
        inputs=[parameter("score", "T")],
        outputs=[parameter("decision", "T")],
        type_constraints=[("T", list(_FLOATS), "A score and its decision have one type.")],
        attributes=[
            attribute("threshold", defs.OpSchema.AttrType.FLOAT, "The gate opens from here on."),
            attribute("name", defs.OpSchema.AttrType.STRING, "What the gate is called; empty: it is numbered."),
        ],
    )
    schema.set_type_and_shape_inference_function(_decision_is_like_score)
    defs.register_schema(schema)


def _decision_is_like_score(context: InferenceContext) -> None:
    context.set_output_type(0, context.get_input_type(0))


_opset: Final = Opset(DOMAIN, 1)


def _translated(score: Any, threshold: float, name: str) -> Any:
    return _opset.Gate(score, threshold=threshold, name=name)


def numbered(name: str) -> Iterator[str]:
    """Give a name, and then the same with a number behind it."""
    yield name
    yield from (f"{name}_{number}" for number in itertools.count(2))
