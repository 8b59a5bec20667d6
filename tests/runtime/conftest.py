"""A bundle written by hand that has what networks have: a stage without an exit, a dense connection, two inputs."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offramp_contract.manifest import Manifest
from offramp_contract.statistics import decision_width, num_top
from offramp_runtime import Device, StageExecutor, open_bundle
from offramp_runtime.device import CpuDevice, OrtValueDevice
from offramp_runtime.providers import on_cpu
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT
WIDTH, CLASSES = 6, 4
node = helper.make_node


@dataclass
class Network:
    """`h0 = tanh(x W0)`, `h1 = tanh(h0 W1)`, `h2 = tanh(h1 W2) + scale h0`; exits score h0, h2, and h0 + h2.

    Attributes:
        manifest: As JSON; `write` fills in the digests.
        graphs: One per stage; a test may spoil them.
    """

    weights: dict[str, np.ndarray]
    manifest: dict[str, Any]
    graphs: list[ModelProto]

    def write(self, folder: Path, temperatures: Sequence[float] | None = None) -> Path:
        """Write the bundle, its digests right."""
        (folder / "stages").mkdir(parents=True)
        for stage, graph in zip(self.manifest["stages"], self.graphs, strict=True):
            content = graph.SerializeToString()
            stage["graph"]["sha256"] = hashlib.sha256(content).hexdigest()
            (folder / stage["graph"]["path"]).write_bytes(content)
        (folder / "manifest.json").write_text(json.dumps(self.manifest))
        if temperatures is not None:
            digest = Manifest.model_validate(self.manifest).model_digest
            calibration = {"format_version": 1, "model_digest": digest, "temperatures": list(temperatures)}
            (folder / "calibration.json").write_text(json.dumps(calibration))
        return folder

    def logits(self, x: np.ndarray, scale: np.ndarray) -> list[np.ndarray]:
        """Compute all exits' logits with numpy."""
        w = self.weights
        h0 = np.tanh(x @ w["W0"])
        h2 = np.tanh(np.tanh(h0 @ w["W1"]) @ w["W2"]) + scale[:, None] * h0
        return [h0 @ w["V0"], h2 @ w["V1"], (h0 + h2) @ w["V2"]]


def build_network() -> Network:
    """Write manifest and graphs, seeded."""
    rng = np.random.default_rng(7)
    weights = {f"W{k}": rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) for k in range(3)}
    weights |= {f"V{k}": rng.standard_normal((WIDTH, CLASSES)).astype(np.float32) for k in range(3)}
    x, h0, h1, h2 = (value(name, WIDTH) for name in ("x", "h0", "h1", "h2"))
    scale = value("scale")
    graphs = [
        graph([*layer("x", 0, "h0"), *scores("h0", 0)], [x], [h0], weights),
        graph(layer("h0", 1, "h1"), [h0], [h1], weights, has_exit=False),
        graph(
            [
                *layer("h1", 2, "deep"),
                *(node("Unsqueeze", ["scale", "axis1"], ["column"]), node("Mul", ["column", "h0"], ["shortcut"])),
                *(node("Add", ["deep", "shortcut"], ["h2"]), *scores("h2", 1)),
            ],
            [h1, h0, scale],
            [h2],
            weights,
        ),
        graph([node("Add", ["h0", "h2"], ["both"]), *scores("both", 2)], [h0, h2], [], weights),
    ]
    return Network(weights, describe([0, None, 1, 2], graphs), graphs)


def describe(exit_of_stage: list[int | None], graphs: list[ModelProto]) -> dict[str, Any]:
    """Write the manifest that these graphs fulfil."""
    stages = [
        {
            "name": f"stage_{index}",
            "graph": {"path": f"stages/{index:02d}.onnx", "sha256": "0" * 64},
            "inputs": [one.name for one in graph.graph.input if one.name != "T"],
            "outputs": [one.name for one in graph.graph.output if one.name not in ("logits", "decision")],
            "exit": exit_index,
            "flops": 100,
            "carry_bytes": 4 * WIDTH,
        }
        for index, (exit_index, graph) in enumerate(zip(exit_of_stage, graphs, strict=True))
    ]
    exits = [
        {
            "name": f"exit_{k}",
            "stage": exit_of_stage.index(k),
            "num_classes": CLASSES,
            "logits": "logits",
            "decision": "decision",
            "temperature": "T",
        }
        for k in range(3)
    ]
    return {
        "format_version": 2,
        "name": "dense",
        "stages": stages,
        "exits": exits,
        "inputs": [tensor("x", WIDTH), tensor("scale")],
        "carries": [tensor(name, WIDTH) for name in ("h0", "h1", "h2")],
        "provenance": {"source": "by hand"},
    }


def tensor(name: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "dtype": "float32", "shape": list(shape)}


def value(name: str, *shape: int | str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, FLOAT, ["batch", *shape])


def layer(source: str, k: int, target: str) -> list[NodeProto]:
    return [node("MatMul", [source, f"W{k}"], [f"{target}_sum"]), node("Tanh", [f"{target}_sum"], [target])]


def scores(source: str, k: int) -> list[NodeProto]:
    """Score a hidden state and compute its decision, as `statistics.decision_of_logits` defines it."""
    return [
        *(node("MatMul", [source, f"V{k}"], ["logits"]), node("Div", ["logits", "T"], ["z"])),
        *(node("TopK", ["z", "k"], ["top_z", "top_i"], axis=1), node("Slice", ["top_z", "0", "1", "1"], ["max_z"])),
        *(node("Slice", ["top_i", "0", "1", "1"], ["max_i"]), node("Sub", ["z", "max_z"], ["shifted"])),
        *(node("Exp", ["shifted"], ["e"]), node("ReduceSum", ["e", "1"], ["sum"], keepdims=1)),
        *(node("Equal", ["classes", "max_i"], ["is_max"]), node("Where", ["is_max", "nil", "e"], ["others"])),
        *(node("ReduceSum", ["others", "1"], ["against"], keepdims=1), node("Log", ["against"], ["minus_log_odds"])),
        *(node("Neg", ["minus_log_odds"], ["log_odds"]), node("Softmax", ["z"], ["p"], axis=1)),
        *(node("LogSoftmax", ["z"], ["log_p"], axis=1), node("Mul", ["p", "log_p"], ["p_log_p"])),
        *(node("ReduceSum", ["p_log_p", "1"], ["minus_h"], keepdims=1), node("Div", ["minus_h", "minus_ln"], ["h"])),
        *(node("GatherElements", ["p", "top_i"], ["top_p"], axis=1), node("Cast", ["top_i"], ["top_c"], to=FLOAT)),
        *(node("Slice", ["top_p", "0", "1", "1"], ["p1"]), node("Slice", ["top_p", "1", "2", "1"], ["p2"])),
        *(node("Sub", ["p1", "p2"], ["gap"]),),
        node("Concat", ["log_odds", "h", "gap", "top_p", "top_c"], ["decision"], axis=1),
    ]


def graph(
    nodes: list[NodeProto],
    inputs: list[ValueInfoProto],
    outputs: list[ValueInfoProto],
    weights: dict[str, np.ndarray],
    has_exit: bool = True,
) -> ModelProto:
    """Put a stage's graph together, with the constants that its nodes read."""
    constants = {
        **weights,
        **{str(i): np.array([i]) for i in range(3)},
        "axis1": np.array([1]),
        "k": np.array([num_top(CLASSES)]),
        "classes": np.arange(CLASSES),
        "nil": np.float32(0),
        "minus_ln": np.float32(-np.log(CLASSES)),
    }
    read = {name for one in nodes for name in one.input}
    initializers = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items() if name in read]
    if has_exit:
        inputs = [*inputs, helper.make_tensor_value_info("T", FLOAT, [])]
        outputs = [*outputs, value("logits", CLASSES), value("decision", decision_width(CLASSES))]
    made = helper.make_graph(nodes, "stage", inputs, outputs, initializers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture
def network() -> Network:
    """A network of one's own, to spoil."""
    return build_network()


@pytest.fixture(scope="session")
def sound() -> Network:
    """The network as it should be."""
    return build_network()


@pytest.fixture(scope="session")
def bundle_folder(sound: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle, calibrated to temperatures 0.5, 2 and 4."""
    return sound.write(tmp_path_factory.mktemp("bundles") / "dense", (0.5, 2.0, 4.0))


def clock(plain_s: float, captured_s: float) -> Callable[[], float]:
    """A clock by which a graph takes so long as it comes, and so long captured: it is read before, between, after."""
    times: Iterator[float] = accumulate(cycle((plain_s, captured_s, 1.0)), initial=0.0)
    return lambda: next(times)


CAPTURED_SIZES = (1, 4, 8)


def capturing_device(plain_s: float = 2.0, captured_s: float = 1.0) -> OrtValueDevice:
    """The CPU as an accelerator is reached whose graphs are captured if that is faster by a clock of one's own."""
    return OrtValueDevice(on_cpu(captures=True), 1, clock(plain_s, captured_s))


@pytest.fixture(scope="session")
def devices() -> dict[str, Device]:
    """The CPU as CPUs are reached, and as an accelerator is, its graphs captured or not."""
    return {
        "arrays": CpuDevice(1),
        "ort_values": OrtValueDevice(on_cpu(), 1),
        "captured": capturing_device(),
    }


@pytest.fixture(scope="session", params=["arrays", "ort_values", "captured"])
def device(request: pytest.FixtureRequest, devices: dict[str, Device]) -> Device:
    """Each of the three."""
    return devices[request.param]


@pytest.fixture(scope="session")
def executor(device: Device, bundle_folder: Path, draw_inputs: Callable[..., dict[str, np.ndarray]]) -> StageExecutor:
    """The sound bundle, loaded on each and warmed up."""
    made = StageExecutor(open_bundle(bundle_folder), device)
    for size in CAPTURED_SIZES:
        tune(made, draw_inputs(size))
    return made


def tune(executor: StageExecutor, inputs: dict[str, np.ndarray]) -> None:
    """Let every stage find out how it runs fastest at these inputs' number of rows."""
    carries = {name: executor.device.upload(array) for name, array in inputs.items()}
    for stage in range(len(executor.manifest.stages)):
        executor.tune(stage, carries)
        carries |= executor.run(stage, carries).carries


@pytest.fixture(scope="session")
def draw_inputs() -> Callable[[int, int], dict[str, np.ndarray]]:
    """Draw model inputs of a number of rows with a seed."""

    def draw(num_rows: int, seed: int = 0) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((num_rows, WIDTH)).astype(np.float32)
        return {"x": x, "scale": rng.uniform(0, 2, num_rows).astype(np.float32)}

    return draw
