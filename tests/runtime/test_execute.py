from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offramp_contract.errors import DigestMismatch, ManifestError
from offramp_contract.statistics import decision_of_logits
from offramp_runtime import Device, StageExecutor, open_bundle, run_all_exits
from offramp_runtime.device import CpuDevice
from onnx import TensorProto, helper

TEMPERATURES = (0.5, 2.0, 4.0)
Draw = Callable[..., dict[str, np.ndarray]]


@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_every_exit_of_a_staged_run_is_the_networks(
    executor: StageExecutor, sound: Any, draw_inputs: Draw, num_rows: int
) -> None:
    inputs = draw_inputs(num_rows)
    exits = run_all_exits(executor, inputs)
    assert len(exits) == 3
    for (logits_BC, _), expected_BC in zip(exits, sound.logits(**inputs), strict=True):
        np.testing.assert_allclose(logits_BC, expected_BC, rtol=1e-4, atol=1e-5)


def test_the_graphs_decision_is_the_oracles_at_the_calibrated_temperature(
    executor: StageExecutor, draw_inputs: Draw
) -> None:
    for (logits_BC, decision_BD), temperature in zip(
        run_all_exits(executor, draw_inputs(8)), TEMPERATURES, strict=True
    ):
        assert isinstance(decision_BD, np.ndarray)
        assert decision_BD.dtype == np.float32
        np.testing.assert_allclose(decision_BD, decision_of_logits(logits_BC, temperature), rtol=1e-4, atol=1e-5)


def test_the_temperature_changes_the_decision_and_not_the_logits(
    sound: Any, draw_inputs: Draw, tmp_path: Path, executor: StageExecutor
) -> None:
    bare = StageExecutor(open_bundle(sound.write(tmp_path / "bare")), executor.device)
    for (logits_BC, decision_BD), (plain_BC, plain_BD) in zip(
        run_all_exits(executor, draw_inputs(3)), run_all_exits(bare, draw_inputs(3)), strict=True
    ):
        np.testing.assert_array_equal(logits_BC, plain_BC)
        np.testing.assert_allclose(plain_BD, decision_of_logits(plain_BC), rtol=1e-4, atol=1e-5)
        assert np.abs(decision_BD - plain_BD).max() > 0.01


def test_both_kinds_of_device_give_the_same_numbers(
    devices: dict[str, Device], bundle_folder: Path, draw_inputs: Draw
) -> None:
    bundle = open_bundle(bundle_folder)
    arrays, ort_values = (
        run_all_exits(StageExecutor(bundle, devices[kind]), draw_inputs(5)) for kind in ("arrays", "ort_values")
    )
    for ours, theirs in zip(arrays, ort_values, strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])


def test_a_stage_gives_the_carries_it_emits_and_an_answer_only_if_it_ends_in_an_exit(
    executor: StageExecutor, draw_inputs: Draw
) -> None:
    device = executor.device
    carries = {name: device.upload(array) for name, array in draw_inputs(2).items()}
    first = executor.run(0, carries)
    assert set(first.carries) == {"h0"}
    assert first.decision_BD is not None
    second = executor.run(1, carries | first.carries)
    assert set(second.carries) == {"h1"}
    assert (second.logits, second.decision_BD) == (None, None)
    third = executor.run(2, carries | first.carries | second.carries)
    last = executor.run(3, carries | first.carries | third.carries)
    assert last.carries == {}
    assert device.download(last.logits).shape == (2, 4)


def test_survivors_of_different_batches_run_together_as_they_would_alone(
    executor: StageExecutor, sound: Any, draw_inputs: Draw
) -> None:
    device = executor.device
    batches = [draw_inputs(num_rows, seed) for num_rows, seed in ((4, 1), (1, 2), (3, 3))]
    ran = []
    for inputs in batches:
        carries = {name: device.upload(array) for name, array in inputs.items()}
        ran.append(carries | executor.run(0, carries).carries)
    rows = [(2, 2), (0, 3), (0, 1), (1, 0), (2, 0)]
    joined = {
        name: device.gather([ran[batch][name] for batch, _ in rows], [row for _, row in rows])
        for name in ("h0", "scale")
    }
    joined |= executor.run(1, joined).carries
    logits = device.download(executor.run(2, joined).logits)
    for place, (batch, row) in enumerate(rows):
        np.testing.assert_allclose(logits[place], sound.logits(**batches[batch])[1][row], rtol=1e-4, atol=1e-5)


def test_a_carry_is_not_disturbed_by_what_runs_after_it(executor: StageExecutor, draw_inputs: Draw) -> None:
    device = executor.device
    first = executor.run(0, {name: device.upload(array) for name, array in draw_inputs(3, 1).items()})
    before = device.download(first.carries["h0"]).copy()
    executor.run(0, {name: device.upload(array) for name, array in draw_inputs(3, 2).items()})
    executor.run(1, first.carries)
    np.testing.assert_array_equal(device.download(first.carries["h0"]), before)


def test_host_arrays_may_be_fed_as_they_are(executor: StageExecutor, sound: Any, draw_inputs: Draw) -> None:
    inputs = draw_inputs(2)
    logits = executor.device.download(executor.run(0, inputs).logits)
    np.testing.assert_allclose(logits, sound.logits(**inputs)[0], rtol=1e-4, atol=1e-5)


def test_a_row_of_nan_stays_in_its_row(executor: StageExecutor, sound: Any, draw_inputs: Draw) -> None:
    inputs = draw_inputs(3)
    inputs["x"][1] = np.nan
    for (logits, decision), expected in zip(run_all_exits(executor, inputs), sound.logits(**inputs), strict=True):
        np.testing.assert_array_equal(np.isnan(decision).any(axis=1), [False, True, False])
        np.testing.assert_allclose(logits[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-5)


def rename(network: Any, stage: int, side: str, index: int, name: str) -> None:
    values = getattr(network.graphs[stage].graph, side)
    old = values[index].name
    values[index].name = name
    for node in network.graphs[stage].graph.node:
        node.input[:] = [name if one == old else one for one in node.input]
        node.output[:] = [name if one == old else one for one in node.output]


def read_another_input(network: Any) -> None:
    rename(network, 0, "input", 0, "y")


def emit_another_output(network: Any) -> None:
    rename(network, 1, "output", 0, "g1")


def name_the_logits_otherwise(network: Any) -> None:
    rename(network, 0, "output", 1, "scores")


def name_the_temperature_otherwise(network: Any) -> None:
    rename(network, 0, "input", 1, "tau")


def lack_the_decision(network: Any) -> None:
    del network.graphs[3].graph.output[1]


def emit_a_surplus_output(network: Any) -> None:
    network.graphs[0].graph.output.append(helper.make_tensor_value_info("h0_sum", TensorProto.FLOAT, ["batch", 6]))


def read_a_surplus_input(network: Any) -> None:
    network.graphs[1].graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 6]))


def take_a_row_of_another_width(network: Any) -> None:
    network.manifest["inputs"][0]["shape"] = [7]


def take_a_row_of_another_rank(network: Any) -> None:
    network.manifest["inputs"][0]["shape"] = [6, 1]


def take_another_dtype(network: Any) -> None:
    network.manifest["inputs"][0]["dtype"] = "float64"


def carry_another_dtype(network: Any) -> None:
    network.manifest["carries"][0]["dtype"] = "float16"


def have_more_classes(network: Any) -> None:
    for exit_ in network.manifest["exits"]:
        exit_["num_classes"] = 5


def fix_the_batch(network: Any) -> None:
    network.graphs[0].graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4


def read_a_scalar_where_rows_are_scalars(network: Any) -> None:
    del network.graphs[2].graph.input[2].type.tensor_type.shape.dim[:]
    unsqueeze = next(node for node in network.graphs[2].graph.node if node.op_type == "Unsqueeze")
    unsqueeze.op_type = "Identity"
    del unsqueeze.input[1:]


def take_a_temperature_per_row(network: Any) -> None:
    network.graphs[0].graph.input[1].type.tensor_type.shape.dim.add(dim_param="batch")


def take_a_whole_temperature(network: Any) -> None:
    network.graphs[0].graph.input[1].type.tensor_type.elem_type = TensorProto.DOUBLE
    for node in network.graphs[0].graph.node:
        node.input[:] = ["T32" if one == "T" else one for one in node.input]
    cast = helper.make_node("Cast", ["T"], ["T32"], to=TensorProto.FLOAT)
    network.graphs[0].graph.node.insert(0, cast)


def pack_another_decision(network: Any) -> None:
    network.graphs[0].graph.node[-1].input.append("h")
    network.graphs[0].graph.output[2].type.tensor_type.shape.dim[1].dim_value = 12


FLAWS: list[tuple[Callable[[Any], None], str]] = [
    (read_another_input, r"graph of 'stage_0' has inputs \['y'\], the manifest says \['x'\]"),
    (emit_another_output, r"graph of 'stage_1' has outputs \['g1'\], the manifest says \['h1'\]"),
    (name_the_logits_otherwise, r"graph of 'stage_0' has outputs \['decision', 'h0', 'scores'\]"),
    (name_the_temperature_otherwise, r"graph of 'stage_0': 'T' must be a scalar float32 input"),
    (lack_the_decision, r"graph of 'stage_3' has outputs \['logits'\]"),
    (emit_a_surplus_output, r"graph of 'stage_0' has outputs .*'h0_sum'"),
    (read_a_surplus_input, r"graph of 'stage_1' has inputs \['h0', 'z'\]"),
    (take_a_row_of_another_width, r"input 'x' is tensor\(float\) \['batch', 6\], the manifest says .*\[batch, 7\]"),
    (take_a_row_of_another_rank, r"the manifest says tensor\(float\) \[batch, 6, 1\]"),
    (take_another_dtype, r"input 'x' is tensor\(float\) .*, the manifest says tensor\(double\)"),
    (carry_another_dtype, r"output 'h0' is tensor\(float\) .*, the manifest says tensor\(float16\)"),
    (have_more_classes, r"output 'logits' is tensor\(float\) \['batch', 4\], the manifest says .*\[batch, 5\]"),
    (fix_the_batch, r"input 'x' is tensor\(float\) \[4, 6\]"),
    (read_a_scalar_where_rows_are_scalars, r"graph of 'stage_2': input 'scale' is tensor\(float\) \[\]"),
    (take_a_temperature_per_row, r"'T' must be a scalar float32 input"),
    (take_a_whole_temperature, r"'T' must be a scalar float32 input"),
    (pack_another_decision, r"output 'decision' is tensor\(float\) \['batch', 12\], the manifest says .*\[batch, 11\]"),
]


@pytest.mark.parametrize(("flaw", "says"), FLAWS, ids=lambda part: getattr(part, "__name__", None))
def test_a_graph_that_is_not_what_the_manifest_says_is_refused_before_it_runs(
    network: Any, device: Device, tmp_path: Path, flaw: Callable[[Any], None], says: str
) -> None:
    flaw(network)
    bundle = open_bundle(network.write(tmp_path / "dense"))
    with pytest.raises(ManifestError, match=says):
        StageExecutor(bundle, device)


def test_a_graph_that_changes_between_opening_and_loading_is_not_loaded(network: Any, tmp_path: Path) -> None:
    folder = network.write(tmp_path / "dense")
    bundle = open_bundle(folder)
    (folder / "stages/02.onnx").write_bytes((folder / "stages/00.onnx").read_bytes())
    with pytest.raises(DigestMismatch, match=r"stages/02\.onnx"):
        StageExecutor(bundle, CpuDevice(1))


def test_a_stage_that_lacks_a_carry_raises(executor: StageExecutor) -> None:
    with pytest.raises(KeyError, match="h0"):
        executor.run(1, {})
