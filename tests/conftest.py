"""Bundles small enough to write by hand, whose answers a test can work out on paper."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from offramp_contract.calibration import CALIBRATION_FILE, Calibration, OperatingPoint
from offramp_contract.manifest import Exit, File, ImagePreprocessing, Manifest, Provenance, Stage, Tensor
from offramp_contract.policy_spec import ConfidenceSpec, PolicySpec
from offramp_contract.statistics import decision_width, num_top
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT
WORK_WIDTH = 256

# A deadline, for a call or for drawing the examples, is a timing assertion, which a busy machine breaks.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@dataclass(frozen=True)
class Toy:
    """A network whose exit k has the logits `gains[k] * x[:num_classes]`, x flattened.

    Attributes:
        work: Matrix products of 256 x 256 that each stage does besides, to take time.
    """

    name: str = "toy"
    row_shape: tuple[int, ...] = (4,)
    num_classes: int = 4
    gains: Sequence[float] = (1.0, 10.0, 100.0)
    labels: tuple[str, ...] | None = None
    preprocessing: Any = None
    default_policy: PolicySpec = field(default_factory=ConfidenceSpec)
    operating_points: tuple[OperatingPoint, ...] = ()
    work: int = 0
    flops: int = 100


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write the bundle of a toy network, given `Toy`'s fields by name; gives its folder."""

    def make(**fields: Any) -> Path:
        toy = Toy(**fields)
        folder = tmp_path_factory.mktemp("bundle") / toy.name
        (folder / "stages").mkdir(parents=True)
        write_bundle(toy, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def toy_bundle(make_bundle: Callable[..., Path]) -> Path:
    """Three exits over four numbers; the exits' logits are x, 10 x and 100 x."""
    return make_bundle(labels=("north", "east", "south", "west"))


@pytest.fixture(scope="session")
def digits_like_bundle(make_bundle: Callable[..., Path]) -> Path:
    """Three exits over 8 x 8 grey images, ten labels; a pixel of the first row and a bit are the classes."""
    grey = ImagePreprocessing(mode="L", height=8, width=8, mean=(0.0,), std=(1.0,))
    return make_bundle(
        name="digits",
        row_shape=(1, 8, 8),
        num_classes=10,
        gains=(3.0, 10.0, 100.0),
        labels=tuple("0123456789"),
        preprocessing=grey,
    )


def write_bundle(toy: Toy, folder: Path) -> None:
    """Write manifest, stages and calibration."""
    last = len(toy.gains) - 1
    stages, exits = [], []
    for index, gain in enumerate(toy.gains):
        source, target = "x" if index == 0 else f"h{index - 1}", None if index == last else f"h{index}"
        graph = _model(_stage_graph(toy, source, target, gain))
        path = f"stages/{index:02d}.onnx"
        (folder / path).write_bytes(graph)
        stages.append(
            Stage(
                name=f"stage_{index}",
                graph=File(path=path, sha256=hashlib.sha256(graph).hexdigest()),
                inputs=(source,),
                outputs=() if target is None else (target,),
                exit=index,
                flops=toy.flops,
                carry_bytes=0 if target is None else 4 * int(np.prod(toy.row_shape)),
            )
        )
        exits.append(
            Exit(
                name=f"exit_{index}",
                stage=index,
                logits="logits",
                decision="decision",
                temperature="T",
                num_classes=toy.num_classes,
            )
        )
    manifest = Manifest(
        name=toy.name,
        inputs=(Tensor(name="x", dtype="float32", shape=toy.row_shape),),
        carries=tuple(Tensor(name=f"h{k}", dtype="float32", shape=toy.row_shape) for k in range(last)),
        stages=tuple(stages),
        exits=tuple(exits),
        labels=toy.labels,
        preprocessing=toy.preprocessing,
        default_policy=toy.default_policy,
        provenance=Provenance(source="written by hand"),
    )
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    if toy.operating_points:
        temperatures = (1.0,) * len(exits)
        calibration = Calibration(
            model_digest=manifest.model_digest, temperatures=temperatures, operating_points=toy.operating_points
        )
        (folder / CALIBRATION_FILE).write_bytes(calibration.to_bytes())


def _stage_graph(toy: Toy, source: str, target: str | None, gain: float) -> GraphProto:
    node = helper.make_node
    nodes = [node("Flatten", [source], ["flat"], axis=1), *_work(toy)]
    nodes += [
        node("Slice", ["worked", "zero", "classes", "axis1"], ["scores"]),
        node("Mul", ["scores", "gain"], ["logits"]),
    ]
    outputs = []
    if target is not None:
        nodes.append(node("Identity", [source], [target]))
        outputs.append(helper.make_tensor_value_info(target, FLOAT, ["batch", *toy.row_shape]))
    outputs += [
        helper.make_tensor_value_info("logits", FLOAT, ["batch", toy.num_classes]),
        helper.make_tensor_value_info("decision", FLOAT, ["batch", decision_width(toy.num_classes)]),
    ]
    inputs = [
        helper.make_tensor_value_info(source, FLOAT, ["batch", *toy.row_shape]),
        helper.make_tensor_value_info("T", FLOAT, []),
    ]
    initializers = [*_constants(toy), numpy_helper.from_array(np.array(gain, dtype=np.float32), "gain")]
    return helper.make_graph([*nodes, *_decision_nodes()], "stage", inputs, outputs, initializers)


def _work(toy: Toy) -> list[NodeProto]:
    node = helper.make_node
    if not toy.work:
        return [node("Identity", ["flat"], ["worked"])]
    body = helper.make_graph(
        [
            node("MatMul", ["state", "weight"], ["product"]),
            node("Tanh", ["product"], ["state_out"]),
            node("Identity", ["go_on"], ["go_on_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, ["batch", WORK_WIDTH]),
        ],
        [
            helper.make_tensor_value_info("go_on_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state_out", FLOAT, ["batch", WORK_WIDTH]),
        ],
    )
    return [
        node("MatMul", ["flat", "spread"], ["state_0"]),
        node("Loop", ["turns", "yes", "state_0"], ["state_n"], body=body),
        node("ReduceSum", ["state_n", "axis1"], ["total"], keepdims=1),
        node("Mul", ["total", "nothing"], ["no_change"]),
        node("Add", ["flat", "no_change"], ["worked"]),
    ]


def _constants(toy: Toy) -> list[TensorProto]:
    width = int(np.prod(toy.row_shape))
    values: dict[str, tuple[Any, Any]] = {
        "k": ([num_top(toy.num_classes)], np.int64),
        "axis1": ([1], np.int64),
        "classes": ([toy.num_classes], np.int64),
        "range": (np.arange(toy.num_classes), np.int64),
        "zero": ([0], np.int64),
        "one": ([1], np.int64),
        "two": ([2], np.int64),
        "no_odds": (0.0, np.float32),
        "ln_classes": (np.log(toy.num_classes), np.float32),
    }
    if toy.work:
        values |= {
            "turns": (toy.work, np.int64),
            "yes": (True, np.bool_),
            "spread": (np.full((width, WORK_WIDTH), 0.01), np.float32),
            "weight": (np.eye(WORK_WIDTH), np.float32),
            "nothing": (1e-30, np.float32),
        }
    return [numpy_helper.from_array(np.array(value, dtype=dtype), name) for name, (value, dtype) in values.items()]


def _decision_nodes() -> list[NodeProto]:
    """Compute what `offramp_contract.statistics.decision_of_logits` does."""
    node = helper.make_node
    return [
        node("Div", ["logits", "T"], ["z"]),
        node("TopK", ["z", "k"], ["top_z", "top_i"], axis=1),
        node("Slice", ["top_z", "zero", "one", "axis1"], ["max_z"]),
        node("Slice", ["top_i", "zero", "one", "axis1"], ["max_i"]),
        node("Sub", ["z", "max_z"], ["shifted"]),
        node("Exp", ["shifted"], ["e"]),
        node("ReduceSum", ["e", "axis1"], ["sum"], keepdims=1),
        node("Equal", ["range", "max_i"], ["is_max"]),
        node("Where", ["is_max", "no_odds", "e"], ["e_others"]),
        node("ReduceSum", ["e_others", "axis1"], ["odds_against"], keepdims=1),
        node("Log", ["odds_against"], ["minus_log_odds"]),
        node("Neg", ["minus_log_odds"], ["log_odds"]),
        node("Log", ["sum"], ["log_sum"]),
        node("Sub", ["shifted", "log_sum"], ["log_p"]),
        node("Div", ["e", "sum"], ["p"]),
        node("Mul", ["p", "log_p"], ["p_log_p"]),
        node("ReduceSum", ["p_log_p", "axis1"], ["minus_h"], keepdims=1),
        node("Div", ["minus_h", "ln_classes"], ["minus_entropy"]),
        node("Neg", ["minus_entropy"], ["entropy"]),
        node("Sub", ["top_z", "max_z"], ["top_shifted"]),
        node("Exp", ["top_shifted"], ["top_e"]),
        node("Div", ["top_e", "sum"], ["top_p"]),
        node("Slice", ["top_p", "zero", "one", "axis1"], ["p_1"]),
        node("Slice", ["top_p", "one", "two", "axis1"], ["p_2"]),
        node("Sub", ["p_1", "p_2"], ["margin"]),
        node("Cast", ["top_i"], ["top_class"], to=FLOAT),
        node("Concat", ["log_odds", "entropy", "margin", "top_p", "top_class"], ["decision"], axis=1),
    ]


def _model(graph: GraphProto) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    serialised: bytes = model.SerializeToString()
    return serialised
