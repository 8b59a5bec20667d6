"""A gated bundle equals the network on every route that is tried, and a shut gate spares what it should.

Beside the decisions that the gates make themselves: all open, all shut, each gate open alone, each shut alone, and
random patterns, in which the rows of one batch disagree. The reference for those is the whole program with its
decisions forced, which itself is compared with the network.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
from offramp_contract.errors import ParityError, SplitError
from offramp_contract.gates import OPEN, SHUT
from offramp_contract.statistics import BoolArray, FloatArray
from offramp_runtime import StageExecutor, run_gated

from offramp_exporter.batch_range import Reference
from offramp_exporter.cost import node_flops, stage_flops
from offramp_exporter.examples import Examples
from offramp_exporter.gating.fold import Constants, Folding, Known
from offramp_exporter.gating.interpret import Interpreter
from offramp_exporter.gating.marks import Gating
from offramp_exporter.program import Program
from offramp_exporter.refusal import explain
from offramp_exporter.rounding import rounding_of
from offramp_exporter.split import Kind, StagePlan, label
from offramp_exporter.verify import refuse_probabilities

_MOST_ALONE: Final = 64
"""Gates that are proved one by one; of more, as many are drawn."""
_NUM_RANDOM: Final = 4
"""Random patterns for each batch size."""


def prove_gates(
    executor: StageExecutor,
    interpreter: Interpreter,
    reference: Reference,
    examples: Examples,
    batches: Sequence[int],
) -> int:
    """Run the bundle, the network and the whole program beside each other.

    Args:
        executor: The bundle, loaded.
        interpreter: The whole program.
        reference: The network.
        examples: Inputs that the network takes; random ones are drawn like them.
        batches: The batch sizes to prove.

    Returns:
        How many rows were decided otherwise than by the network because a score lies within rounding of its threshold.

    Raises:
        ParityError: Naming exit, pattern and the largest deviation.
    """
    proof = _GateProof(executor, interpreter)
    num_flips = 0
    for batch in batches:
        generator = np.random.default_rng(batch)
        cases = {"the example": examples.with_rows(batch), "random inputs": examples.random(batch, seed=batch)}
        for kind, inputs in cases.items():
            case = f"at batch {batch} on {kind}"
            expected = reference(inputs)
            num_flips += proof.compare_own(inputs, expected, case)
        for pattern, is_open_BG in _patterns(len(executor.manifest.gates), batch, generator):
            proof.compare_forced(cases["random inputs"], is_open_BG, f"{pattern} {case}")
    refuse_probabilities(executor.manifest.exits, expected)
    return num_flips


def _patterns(num_gates: int, batch: int, generator: np.random.Generator) -> Iterator[tuple[str, BoolArray]]:
    shape = (batch, num_gates)
    yield "with all gates open", np.ones(shape, dtype=bool)
    yield "with all gates shut", np.zeros(shape, dtype=bool)
    alone = np.arange(num_gates)
    if num_gates > _MOST_ALONE:
        alone = generator.choice(num_gates, _MOST_ALONE, replace=False)
    for start in range(0, len(alone), batch):
        gates = np.resize(alone[start : start + batch], batch)
        only_BG = np.zeros(shape, dtype=bool)
        only_BG[np.arange(batch), gates] = True
        yield "with one gate open in each row", only_BG
        yield "with one gate shut in each row", ~only_BG
    for _ in range(_NUM_RANDOM):
        yield "with a random pattern of gates", generator.random(shape) < 0.5


class _GateProof:
    def __init__(self, executor: StageExecutor, interpreter: Interpreter) -> None:
        self._executor, self._interpreter = executor, interpreter
        self._tolerance = rounding_of(executor.manifest).tolerance
        marks = [mark.name for mark in interpreter.marks]
        self._columns = [marks.index(gate.name) for gate in executor.manifest.gates]
        self._num_marks = len(marks)

    def compare_own(self, inputs: Examples, expected: Sequence[FloatArray], case: str) -> int:
        """Let the gates decide; gives how many rows they decide otherwise than the network, by rounding."""
        try:
            outcome = run_gated(self._executor, inputs.arrays)
        except Exception as error:  # ONNX Runtime's errors have no public base
            raise ParityError(f"a stage fails {case}{explain(error)}") from error
        actual = [scores_BC for scores_BC, _ in outcome.exits]
        own = self._interpreter.run(inputs)
        scores_BG, is_open_BG = own.scores_BG[:, self._columns], own.is_open_BG[:, self._columns]
        gates = self._executor.manifest.gates
        was_asked_BG = ~np.isnan(outcome.scores_BG) | np.array([gate.stage is None for gate in gates])
        differs_BG = (is_open_BG != outcome.is_open_BG) & was_asked_BG
        thresholds_G = np.array([gate.threshold for gate in gates])
        is_near_B = (np.abs(scores_BG - thresholds_G) <= self._tolerance).any(axis=1)
        wrong_B = differs_BG.any(axis=1) & ~is_near_B
        if wrong_B.any():
            name = gates[int(differs_BG[wrong_B].any(axis=0).argmax())].name
            raise ParityError(f"gate {name!r} decides otherwise {case} than in the network")
        flipped_B = differs_BG.any(axis=1)
        self._compare(actual, own.exits, ~flipped_B, f"{case}, against the graph in one piece,")
        self._compare(actual, expected, ~is_near_B, case)
        self._compare(actual, self._forced(inputs, outcome.is_open_BG), flipped_B, case)
        return int(flipped_B.sum())

    def compare_forced(self, inputs: Examples, is_open_BG: BoolArray, case: str) -> None:
        """Decide from outside."""
        try:
            outcome = run_gated(self._executor, inputs.arrays, np.where(is_open_BG, OPEN, SHUT))
        except Exception as error:  # ONNX Runtime's errors have no public base
            raise ParityError(f"a stage fails {case}{explain(error)}") from error
        expected = self._forced(inputs, is_open_BG)
        everyone_B = np.ones(inputs.num_rows, dtype=bool)
        self._compare([scores for scores, _ in outcome.exits], expected, everyone_B, case)

    def _forced(self, inputs: Examples, is_open_BG: BoolArray) -> list[FloatArray]:
        """Ask the whole program; gates that decide about nothing are no gates of the bundle."""
        marked_BG = np.zeros((inputs.num_rows, self._num_marks), dtype=bool)
        marked_BG[:, self._columns] = is_open_BG
        return self._interpreter.run(inputs, marked_BG).exits

    def _compare(
        self, actual: Sequence[FloatArray], expected: Sequence[FloatArray], counts_B: BoolArray, case: str
    ) -> None:
        for exit_, actual_BC, expected_BC in zip(self._executor.manifest.exits, actual, expected, strict=True):
            ours_BC, theirs_BC = actual_BC[counts_B], expected_BC[counts_B]
            if not np.isclose(ours_BC, theirs_BC, rtol=self._tolerance, atol=self._tolerance, equal_nan=True).all():
                deviation = float(np.abs(np.subtract(ours_BC, theirs_BC, dtype=np.float64)).max())
                raise ParityError(
                    f"exit {exit_.name!r}: staged execution {case} differs from the network by up to {deviation:.3g}; "
                    f"allowed are {self._tolerance:g} + {self._tolerance:g}*|value|"
                )


def prove_spared(program: Program, specialized: Program, plans: Sequence[StagePlan]) -> None:
    """Check that trunk holds what is needed with all gates shut, and no work besides that only open gates need.

    Work that the bodies of several gates share, a norm in front of two parallel ones, may stay with the trunk.

    Args:
        program: As it was traced.
        specialized: As it is cut.
        plans: Its stages.

    Raises:
        SplitError: If a gate spares nothing, or less than it should, naming the node.
    """
    gating = specialized.gating
    if gating is None:
        return
    for index, gate in enumerate(gating.gates):
        if not any(index in plan.gates and stage_flops(specialized, plan) for plan in plans):
            raise SplitError(
                f"gate {gate.name!r} spares nothing when it is shut: what it decides about is needed all the same, or "
                "costs nothing; write x + decision * body(x), or torch.where(decision > 0.5, body(x), x)"
            )
    trunk = _work(specialized, [i for plan in plans if not plan.gates for i in plan.nodes])
    needed = _needed(program, specialized)
    shut = _work(program, needed(frozenset()))
    late = {*trunk} - {*shut}
    routes = {route: _work(program, needed(route)) for route in _routes(len(program.marks))} if late else {}
    for name in late:
        for mark in range(len(program.marks)):
            if not any(name in work for route, work in routes.items() if mark not in route):
                raise SplitError(
                    f"node {label(program.nodes[program.producer[name]])} would run although gate "
                    f"{program.marks[mark].name!r} is shut; write the block as x + decision * body(x)"
                )
    missing = {*shut} - {*trunk}
    if missing or any(trunk[name] != shut[name] for name in shut):
        raise SplitError(f"the trunk does not hold {sorted(missing)}, which is needed with all gates shut; a bug")


def _routes(num_gates: int) -> set[frozenset[int]]:
    """Give the sets of open gates that tell work of several bodies from work of one: each alone, all but each."""
    everyone = frozenset(range(num_gates))
    return {route for gate in everyone for route in (frozenset([gate]), everyone - {gate})}


def _work(program: Program, nodes: Sequence[int]) -> dict[str, int]:
    """Give what costs something among some nodes, by the name that it was traced with."""
    origins = {} if program.gating is None else program.gating.origins
    costs = {program.nodes[i].output[0]: node_flops(program, program.nodes[i]) for i in nodes}
    return {origins.get(name, name): flops for name, flops in costs.items() if flops}


def _needed(program: Program, specialized: Program) -> Callable[[frozenset[int]], list[int]]:
    """Give what tells the nodes that are needed when some gates are open and all others shut."""
    constants = Constants(program)
    gating = Gating(()) if specialized.gating is None else specialized.gating
    scored = {gate.name for gate in gating.gates if gate.score is not None and gate.score not in gating.regions}
    scores = [mark.score for mark in program.marks if mark.name in scored]

    def nodes(open_gates: frozenset[int]) -> list[int]:
        fixed: dict[str, Known] = {}
        for index, mark in enumerate(program.marks):
            known = constants.filled(mark.decision, float(index in open_gates))
            if known is not None:
                fixed[mark.decision] = known
        wanted = [*program.exits.values(), *program.natives.values(), *scores]
        live = Folding(program, constants, fixed).live(wanted)
        return sorted(i for i in live if constants.kinds[program.nodes[i].output[0]] is Kind.DATA)

    return nodes
