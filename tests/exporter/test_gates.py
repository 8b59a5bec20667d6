"""Networks with gates become bundles whose bodies are really skipped, and answer as the network does.

Every way of writing a gated block in `gated_networks` is exported with no word about it. The oracle is the network
itself, its gates decided from outside.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from gated_networks import (
    JOINS,
    RETURNING,
    WAYS,
    Central,
    Cheap,
    Concatenated,
    Downsample,
    EitherOpens,
    EveryJoin,
    Idle,
    MulAdd,
    Nested,
    NestedWhole,
    Parallel,
    Priorities,
    Product,
    Recurrent,
    ReturnsEarly,
    ReturnsIdle,
    ReturnsScores,
    Reused,
    SparesNothing,
    Summed,
    TwoMerges,
    WithExits,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from offramp_contract.errors import ParityError, SplitError, TraceError
from offramp_contract.gates import OPEN, SHUT, gate_thresholds
from offramp_contract.manifest import Manifest
from offramp_exporter import explain, export
from offramp_exporter.examples import Examples
from offramp_exporter.gating.interpret import Interpreter
from offramp_exporter.gating.proof import prove_gates
from offramp_exporter.trace import trace
from offramp_runtime import Bundle, Outcome, StageExecutor, open_device, run_gated
from torch import Tensor, nn

DEVICE = open_device("cpu")


@dataclass(frozen=True)
class Exported:
    """A network and its bundle, loaded."""

    network: nn.Module
    bundle: Bundle
    executor: StageExecutor

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    def run(self, inputs: Tensor, is_open_BG: np.ndarray | None = None) -> Outcome:
        thresholds = None if is_open_BG is None else np.where(is_open_BG, OPEN, SHUT)
        name = self.manifest.inputs[0].name
        return run_gated(self.executor, {name: inputs.numpy()}, thresholds)

    def eager(self, inputs: Tensor, is_open_BG: np.ndarray | None = None) -> list[np.ndarray]:
        """Ask the network, its gates decided from outside if they are to be."""
        with torch.no_grad(), decided(is_open_BG):
            returned = self.network(inputs)
        returned = returned[0] if isinstance(returned, tuple) else returned
        return [logits.numpy() for logits in (returned if isinstance(returned, list) else [returned])]


@contextmanager
def decided(is_open_BG: np.ndarray | None) -> Iterator[None]:
    """Let gates be what they are told, in the order in which they are asked."""
    columns = iter([] if is_open_BG is None else torch.tensor(is_open_BG).float().T)

    def told(score: Tensor, threshold: float = 0.5, name: str = "") -> Tensor:
        del threshold, name
        return next(columns).reshape(score.shape)

    import gated_networks

    with pytest.MonkeyPatch.context() as patch:
        if is_open_BG is not None:
            patch.setattr(gated_networks, "gate", told)
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[type[nn.Module]], Exported]:
    @cache
    def make(way: type[nn.Module]) -> Exported:
        torch.manual_seed(1)
        network = way().eval()
        folder = tmp_path_factory.mktemp(way.__name__) / "bundle"
        bundle = export(network, torch.randn(16, *way.inputs), folder, gates=getattr(way, "gates", None))
        return Exported(network, bundle, StageExecutor(bundle, DEVICE))

    return make


def draw(way: type[nn.Module], batch: int, seed: int = 7) -> Tensor:
    return torch.randn(batch, *way.inputs, generator=torch.Generator().manual_seed(seed))


def assert_same(outcome: Outcome, expected: list[np.ndarray]) -> None:
    for (actual, _), wanted in zip(outcome.exits, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", [*WAYS, *RETURNING], ids=lambda way: way.__name__)
def test_gates_decide_as_in_the_network_alone_and_in_batches_whose_rows_disagree(
    exported: Callable[[type[nn.Module]], Exported], way: type[nn.Module]
) -> None:
    made = exported(way)
    inputs = draw(way, 16)

    outcome = made.run(inputs)

    assert_same(outcome, made.eager(inputs))
    if way is not Priorities:
        assert 0 < outcome.is_open_BG.mean() < 1
    for row in range(4):
        assert_same(made.run(inputs[row : row + 1]), made.eager(inputs[row : row + 1]))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("batch", [1, 16])
def test_forced_gates_answer_as_the_network_whose_gates_are_forced(
    exported: Callable[[type[nn.Module]], Exported], way: type[nn.Module], batch: int
) -> None:
    made = exported(way)
    inputs = draw(way, batch)
    shape = (batch, len(made.manifest.gates))
    generator = np.random.default_rng(batch)
    forced = (np.ones(shape), np.zeros(shape), *generator.random((3, *shape)).round())
    for is_open_BG in (pattern.astype(bool) for pattern in forced):
        outcome = made.run(inputs, is_open_BG)

        assert_same(outcome, made.eager(inputs, is_open_BG))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_row_runs_the_bodies_of_its_open_gates_and_no_others(
    exported: Callable[[type[nn.Module]], Exported], way: type[nn.Module]
) -> None:
    made = exported(way)
    stages = made.manifest.stages
    outcome = made.run(draw(way, 16))
    for row in range(16):
        wanted = [all(outcome.is_open_BG[row, gate] for gate in stage.gates) for stage in stages]
        assert outcome.ran_BS[row].tolist() == wanted
    for gate in range(len(made.manifest.gates)):
        assert sum(stage.flops for stage in stages if gate in stage.gates) >= 80


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_pattern_of_gates_in_any_batch_answers_as_the_network(
    exported: Callable[[type[nn.Module]], Exported], data: st.DataObject
) -> None:
    made = exported(data.draw(st.sampled_from([TwoMerges, Recurrent, Nested, Product, WithExits, Parallel])))
    batch = data.draw(st.integers(1, 9))
    rows = st.lists(st.booleans(), min_size=len(made.manifest.gates), max_size=len(made.manifest.gates))
    is_open_BG = np.array(data.draw(st.lists(rows, min_size=batch, max_size=batch)))
    inputs = draw(type(made.network), batch, data.draw(st.integers(0, 2**16)))

    assert_same(made.run(inputs, is_open_BG), made.eager(inputs, is_open_BG))


def shape_of(manifest: Manifest) -> list[tuple[int, ...]]:
    return [stage.gates for stage in manifest.stages]


def test_all_central_scores_are_in_the_first_stage(exported: Callable[[type[nn.Module]], Exported]) -> None:
    manifest = exported(Central).manifest
    assert shape_of(manifest) == [(), (0,), (), (1,), ()]
    assert [gate.stage for gate in manifest.gates] == [0, 0]


def test_a_block_behind_relu_needs_no_trunk_between_it_and_the_next(
    exported: Callable[[type[nn.Module]], Exported],
) -> None:
    stages = exported(Recurrent).manifest.stages
    run = [merge.run for stage in stages for merge in stage.merges]
    assert run == [*run[:1], "relu_1"]  # the second block's ReLU does nothing to its shortcut, which went through one


def test_one_gate_over_two_blocks_and_one_over_two_merges(exported: Callable[[type[nn.Module]], Exported]) -> None:
    assert shape_of(exported(Reused).manifest) == [(), (0,), (), (0,), ()]
    assert exported(Reused).manifest.gates[0].name == "both"
    stages = exported(TwoMerges).manifest.stages
    assert [len(stage.merges) for stage in stages] == [0, 2, 0]


def test_work_that_several_bodies_read_stays_with_the_trunk(exported: Callable[[type[nn.Module]], Exported]) -> None:
    assert shape_of(exported(Parallel).manifest) == [(), (0,), (1,), ()]


def test_a_shortcut_with_work_of_its_own_is_trunk_and_stands_for_the_block(
    exported: Callable[[type[nn.Module]], Exported],
) -> None:
    stages = exported(Downsample).manifest.stages
    body = next(stage for stage in stages if stage.gates == (1,))
    assert body.merges[0].skip in stages[stages.index(body) - 1].outputs
    # On 3x3 places 6 channels, each of 3x3 x 4 multiply-adds; the bias, into which the normalisation went; the sum.
    assert body.flops == 54 * (2 * 36 + 1) + 54


def test_something_cheap_in_place_of_a_body_is_trunk(exported: Callable[[type[nn.Module]], Exported]) -> None:
    trunk, body, *_ = exported(Cheap).manifest.stages
    assert body.merges[0].skip in trunk.outputs
    assert body.merges[0].skip not in body.inputs


def test_zeros_stand_for_a_body_that_has_no_shortcut(exported: Callable[[type[nn.Module]], Exported]) -> None:
    made = exported(Concatenated)
    assert shape_of(made.manifest) == [(), (0,), (), (1,), ()]


def test_a_gate_inside_a_body_is_scored_there(exported: Callable[[type[nn.Module]], Exported]) -> None:
    manifest = exported(Nested).manifest
    assert shape_of(manifest) == [(), (0,), (0, 1), (0,), ()]
    assert [(gate.name, gate.stage) for gate in manifest.gates] == [("outer", 0), ("inner", 1)]


@pytest.mark.parametrize("way", [NestedWhole, Product])
def test_a_body_behind_two_gates_is_one_stage(
    exported: Callable[[type[nn.Module]], Exported], way: type[nn.Module]
) -> None:
    assert shape_of(exported(way).manifest) == [(), (0, 1), ()]


def test_exits_stand_between_gates(exported: Callable[[type[nn.Module]], Exported]) -> None:
    stages = exported(WithExits).manifest.stages
    ends = [(stage.gates, stage.exit) for stage in stages if stage.gates or stage.exit is not None]
    assert ends == [((), 0), ((0,), None), ((), 1), ((1,), None), ((), 2)]


def test_constant_scores_are_priorities_and_a_count_keeps_the_first(
    exported: Callable[[type[nn.Module]], Exported],
) -> None:
    made = exported(Priorities)
    assert [(gate.name, gate.priority, gate.stage) for gate in made.manifest.gates] == [
        ("block_0", 0.9, None),
        ("block_1", 0.6, None),
    ]
    assert all(stage.scores is None for stage in made.manifest.stages)
    inputs = draw(Priorities, 3)
    kept = run_gated(made.executor, {"x": inputs.numpy()}, gate_thresholds(made.manifest, 1))
    assert_same(kept, made.eager(inputs, np.array([[True, False]] * 3)))


def test_a_threshold_shuts_gates_by_their_scores(exported: Callable[[type[nn.Module]], Exported]) -> None:
    made = exported(MulAdd)
    inputs = draw(MulAdd, 16)
    outcome = run_gated(made.executor, {"x": inputs.numpy()}, gate_thresholds(made.manifest, "own", 0.8))
    np.testing.assert_array_equal(outcome.is_open_BG, outcome.scores_BG >= 0.8)
    assert_same(outcome, made.eager(inputs, outcome.is_open_BG))


@pytest.mark.parametrize(
    ("way", "sentence"),
    [
        (Summed, r"reads the decision of gate 'gate_0' .* would always run; write the block as x \+ decision"),
        (EitherOpens, r"\(Max\) at gated_networks.py:\d+ .*reads the decision of gate 'gate_0'"),
        (SparesNothing, "gate 'gate_0' spares nothing when it is shut"),
    ],
)
def test_what_cannot_be_seen_through_is_refused(tmp_path: Path, way: type[nn.Module], sentence: str) -> None:
    with pytest.raises(SplitError, match=sentence):
        export(way(), draw(way, 4), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("way", "sentence"),
    [
        (ReturnsScores, r"gates: 'out\[1\]\[0\]' holds other numbers than 0 and 1"),
        (ReturnsIdle, "gates: no exit depends on gate_0"),
    ],
)
def test_returned_tensors_that_are_no_decisions_are_refused(
    tmp_path: Path, way: type[nn.Module], sentence: str
) -> None:
    with pytest.raises(TraceError, match=sentence):
        export(way(), draw(way, 4), tmp_path / "bundle", gates=["out[1]"])


@pytest.mark.parametrize("apart", [1e-6, 1e-2])
def test_a_decision_within_rounding_of_its_threshold_is_counted_and_any_other_difference_fails(
    exported: Callable[[type[nn.Module]], Exported], apart: float
) -> None:
    made = exported(MulAdd)
    inputs = Examples({"x": draw(MulAdd, 3).numpy()})
    program = trace(made.network, draw(MulAdd, 3)).program
    score = float(Interpreter(program, DEVICE).run(inputs).scores_BG[1, 0])
    first, *others = program.marks
    marks = (replace(first, threshold=score + apart / 2), *others)
    interpreter = Interpreter(replace(program, marks=marks), DEVICE)
    gate, *rest = made.manifest.gates
    gates = (gate.model_copy(update={"threshold": score - apart / 2}), *rest)
    executor = StageExecutor(made.bundle, DEVICE)
    executor.manifest = made.manifest.model_copy(update={"gates": gates})

    def prove() -> int:
        return prove_gates(executor, interpreter, lambda given: interpreter.run(given).exits, inputs, [3])

    if apart < 1e-4:
        assert prove() == 1
    else:
        with pytest.raises(ParityError, match="gate 'gate_0' decides otherwise at batch 3 on the example"):
            prove()


def test_a_merge_with_the_wrong_value_is_caught(exported: Callable[[type[nn.Module]], Exported]) -> None:
    made = exported(TwoMerges)
    inputs = draw(TwoMerges, 8)
    interpreter = Interpreter(trace(made.network, inputs).program, DEVICE)
    stages = list(made.manifest.stages)
    first, second = stages[1].merges
    stages[1] = stages[1].model_copy(update={"merges": (first, second.model_copy(update={"skip": first.skip}))})
    executor = StageExecutor(made.bundle, DEVICE)
    executor.manifest = made.manifest.model_copy(update={"stages": tuple(stages)})
    examples = Examples({"x": inputs.numpy()})

    with pytest.raises(ParityError, match=r"exit 'exit_0': staged execution .* differs from the network"):
        prove_gates(executor, interpreter, lambda given: interpreter.run(given).exits, examples, [8])


def test_a_gate_whose_decision_comes_to_nothing_is_no_gate_of_the_bundle(
    exported: Callable[[type[nn.Module]], Exported],
) -> None:
    made = exported(Idle)
    assert [gate.name for gate in made.manifest.gates] == ["used"]
    inputs = draw(Idle, 16)
    assert_same(made.run(inputs), made.eager(inputs))


def test_gates_have_the_names_that_they_were_given(exported: Callable[[type[nn.Module]], Exported]) -> None:
    gates = exported(EveryJoin).manifest.gates
    assert [gate.name for gate in gates] == [join.__name__ for join in JOINS]
    assert {gate.threshold for gate in gates} == {0.5}


def test_a_network_that_returns_early_keeps_its_gates_and_its_rule(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = ReturnsEarly().eval()
    bundle = export(network, draw(ReturnsEarly, 8), tmp_path / "bundle")

    assert [gate.stage for gate in bundle.manifest.gates] == [0, 3]
    assert bundle.manifest.exits[0].native is not None


def test_gates_are_explained_before_anything_is_written() -> None:
    explained = explain(Nested().eval(), draw(Nested, 4))

    outer, inner = explained.gates
    assert (outer.stage, outer.bodies, inner.stage, inner.bodies) == (0, (1, 2, 3), 1, (2,))
    assert explained.trunk_flops + outer.flops == explained.full_flops
    assert 0 < inner.flops < outer.flops
    assert all(", else " in merge for merge in (*outer.merges, *inner.merges))
