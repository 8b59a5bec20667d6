"""A gated bundle by hand: two bodies, the second with a gate of its own inside, and one exit."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offramp_contract.gates import OPEN, SHUT
from offramp_contract.statistics import decision_width
from offramp_runtime import StageExecutor, open_bundle, run_all_exits, run_gated
from offramp_runtime.device import Device
from onnx import numpy_helper, parser

WIDTH, CLASSES = 4, 3
FLOPS = (10, 20, 5, 40, 80, 160, 7)
FLOAT = np.float32

GRAPHS = [
    "g (float[batch, 4] x) => (float[batch, 4] h, float[batch, 1] scores) "
    "{ a = MatMul(x, W) h = Tanh(a) b = MatMul(x, G) scores = Sigmoid(b) }",
    "g (float[batch, 4] h) => (float[batch, 4] after_0) { a = MatMul(h, V) b = Tanh(a) after_0 = Add(h, b) }",
    "g (float[batch, 4] after_0) => (float[batch, 1] scores) { a = MatMul(after_0, G) scores = Sigmoid(a) }",
    "g (float[batch, 4] after_0) => (float[batch, 4] inside, float[batch, 1] scores) "
    "{ a = MatMul(after_0, V) inside = Tanh(a) b = MatMul(inside, G) scores = Sigmoid(b) }",
    "g (float[batch, 4] inside) => (float[batch, 4] inner) "
    "{ a = MatMul(inside, W) b = Tanh(a) inner = Add(inside, b) }",
    "g (float[batch, 4] inner, float[batch, 4] after_0) => (float[batch, 4] after_1) { after_1 = Add(after_0, inner) }",
    "g (float[batch, 4] after_1, float T) => (float[batch, 3] logits, float[batch, 9] decision) "
    "{ logits = MatMul(after_1, C) decision = MatMul(logits, Z) }",
]
GATED = [(), (0,), (), (1,), (1, 2), (1,), ()]
MERGES = {1: ("after_0", "h"), 4: ("inner", "inside"), 5: ("after_1", "after_0")}


def sigmoid(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.asarray(1 / (1 + np.exp(-x)))


@dataclass
class Gated:
    """The network in numpy, one row at a time, and its bundle."""

    weights: dict[str, np.ndarray]

    def run(self, x: np.ndarray, threshold_G: np.ndarray) -> tuple[np.ndarray, list[int], list[float]]:
        """Give the logits, the stages that run, and the scores; NaN where none is computed."""
        w = self.weights
        h = np.tanh(x @ w["W"])
        scores, ran = [float(sigmoid(x @ w["G"])[0])], [0]
        if scores[0] >= threshold_G[0]:
            h = h + np.tanh(h @ w["V"])
            ran.append(1)
        scores.append(float(sigmoid(h @ w["G"])[0]))
        ran.append(2)
        scores.append(float("nan"))
        if scores[1] >= threshold_G[1]:
            inner = np.tanh(h @ w["V"])
            scores[2] = float(sigmoid(inner @ w["G"])[0])
            ran.append(3)
            if scores[2] >= threshold_G[2]:
                inner = inner + np.tanh(inner @ w["W"])
                ran.append(4)
            h = h + inner
            ran.append(5)
        return h @ w["C"], [*ran, 6], scores

    def write(self, folder: Path, **changes: Any) -> Path:
        """Write its bundle."""
        (folder / "stages").mkdir(parents=True)
        stages = []
        for index, text in enumerate(GRAPHS):
            model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {text}')
            read = {name for one in model.graph.node for name in one.input} & set(self.weights)
            model.graph.initializer.extend(numpy_helper.from_array(self.weights[name], name) for name in sorted(read))
            content = model.SerializeToString()
            path = f"stages/{index:02d}.onnx"
            (folder / path).write_bytes(content)
            outputs = [one.name for one in model.graph.output]
            stages.append(
                {
                    "name": f"stage_{index}",
                    "graph": {"path": path, "sha256": hashlib.sha256(content).hexdigest()},
                    "inputs": [one.name for one in model.graph.input if one.name != "T"],
                    "outputs": [name for name in outputs if name not in ("scores", "logits", "decision")],
                    "scores": "scores" if "scores" in outputs else None,
                    "exit": 0 if index == 6 else None,
                    "gates": GATED[index],
                    "merges": [dict(zip(("run", "skip"), MERGES[index], strict=True))] if index in MERGES else [],
                    "flops": FLOPS[index],
                    "carry_bytes": 0,
                }
            )
        carries = [name for stage in stages for name in stage["outputs"]]
        manifest = {
            "format_version": 2,
            "name": "gated",
            "inputs": [{"name": "x", "dtype": "float32", "shape": [WIDTH]}],
            "carries": [{"name": name, "dtype": "float32", "shape": [WIDTH]} for name in carries],
            "stages": stages,
            "exits": [
                {"name": "final", "stage": 6, "num_classes": CLASSES}
                | {name: name for name in ("logits", "decision")}
                | {"temperature": "T"}
            ],
            "gates": [{"name": f"gate_{index}", "stage": stage} for index, stage in enumerate((0, 2, 3))],
            "provenance": {"source": "by hand"},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest | changes))
        return folder


@pytest.fixture(scope="session")
def gated() -> Gated:
    rng = np.random.default_rng(5)
    shapes = {"W": (WIDTH, WIDTH), "V": (WIDTH, WIDTH), "G": (WIDTH, 1), "C": (WIDTH, CLASSES)}
    weights = {name: rng.standard_normal(shape).astype(FLOAT) * 1.5 for name, shape in shapes.items()}
    return Gated(weights | {"Z": np.zeros((CLASSES, decision_width(CLASSES)), FLOAT)})


@pytest.fixture(scope="session")
def folder(gated: Gated, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gated.write(tmp_path_factory.mktemp("gated") / "bundle")


@pytest.fixture(scope="session")
def executor(folder: Path, device: Device) -> StageExecutor:
    return StageExecutor(open_bundle(folder), device)


def rows(num_rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_rows, WIDTH)).astype(FLOAT)


THRESHOLDS = st.one_of(st.just(OPEN), st.just(SHUT), st.floats(0.05, 0.95))


@given(st.data(), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=60)
def test_each_row_runs_the_stages_that_its_own_gates_open(
    gated: Gated, executor: StageExecutor, data: st.DataObject, num_rows: int, seed: int
) -> None:
    x_BD = rows(num_rows, seed)
    threshold_BG = np.array(
        [data.draw(st.lists(THRESHOLDS, min_size=3, max_size=3)) for _ in range(num_rows)], dtype=np.float64
    )
    outcome = run_gated(executor, {"x": x_BD}, threshold_BG)
    for row, (x, threshold_G) in enumerate(zip(x_BD, threshold_BG, strict=True)):
        logits, ran, scores = gated.run(x, threshold_G)
        if any(abs(score - threshold) < 1e-5 for score, threshold in zip(scores, threshold_G, strict=True)):
            continue  # float32 and float64 may fall on different sides
        np.testing.assert_allclose(outcome.exits[0][0][row], logits, rtol=1e-5, atol=1e-5)
        assert np.flatnonzero(outcome.ran_BS[row]).tolist() == ran
        np.testing.assert_allclose(outcome.scores_BG[row], scores, rtol=1e-5, atol=1e-6)


def test_the_networks_own_thresholds_hold_where_none_are_given(executor: StageExecutor) -> None:
    x = {"x": rows(50, 1)}
    own = run_gated(executor, x)
    same = run_gated(executor, x, np.array([0.5, 0.5, 0.5]))
    assert (own.is_open_BG == same.is_open_BG).all()
    assert 0 < own.is_open_BG.mean() < 1
    np.testing.assert_array_equal(run_all_exits(executor, x)[0][0], own.exits[0][0])


def test_a_gate_inside_a_body_that_does_not_run_is_shut(executor: StageExecutor) -> None:
    outcome = run_gated(executor, {"x": rows(8, 2)}, np.array([OPEN, SHUT, OPEN]))
    assert np.isnan(outcome.scores_BG[:, 2]).all()
    assert not outcome.is_open_BG[:, 2].any()
    assert not outcome.ran_BS[:, 3:6].any()


def test_a_body_is_not_run_when_every_gate_is_shut(folder: Path, device: Device) -> None:
    executor, ran = StageExecutor(open_bundle(folder), device), []
    run = executor.run
    executor.run = lambda stage, carries: ran.append(stage) or run(stage, carries)  # type: ignore[method-assign]
    run_gated(executor, {"x": rows(5, 3)}, np.full(3, SHUT))
    assert ran == [0, 2, 6]


def test_a_network_that_needs_several_rows_gets_them_in_its_bodies_too(
    gated: Gated, device: Device, tmp_path: Path
) -> None:
    executor = StageExecutor(open_bundle(gated.write(tmp_path / "pairs", min_batch=2)), device)
    sizes = []
    run = executor.run
    executor.run = lambda stage, carries: (  # type: ignore[method-assign]
        sizes.append(len(device.download(carries[executor.manifest.stages[stage].inputs[0]]))) or run(stage, carries)
    )
    x = rows(4, 4)
    outcome = run_gated(executor, {"x": x}, np.array([[OPEN] * 3] + [[SHUT] * 3] * 3))
    assert min(sizes) == 2
    np.testing.assert_allclose(outcome.exits[0][0][0], gated.run(x[0], np.full(3, OPEN))[0], rtol=1e-5, atol=1e-5)
