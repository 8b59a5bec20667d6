"""Staged execution equals the network, or there is no bundle.

The stages run through the server's own runtime, so that the proof covers what serves. What is proved: every node of
the program is in exactly one stage; every exit's scores equal the network's at several batch sizes, on the given
example and on random inputs; the decision statistics equal the numpy oracle; and a row's answers do not change when
the rows beside it leave.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from offramp_contract.errors import ManifestError, ParityError, SplitError, TraceError
from offramp_contract.manifest import Exit
from offramp_contract.statistics import LOG_ODDS, BoolArray, FloatArray, decision_of_logits
from offramp_runtime import Bundle, Device, DeviceTensor, StageExecutor, run_all_exits

from offramp_exporter.batch_range import Reference
from offramp_exporter.coverage import perturbed
from offramp_exporter.examples import Examples
from offramp_exporter.program import Program, values_read
from offramp_exporter.refusal import explain
from offramp_exporter.rounding import SINGLE, rounding_of
from offramp_exporter.split import Kind, StagePlan, classify

MAX_FLIPS: Final = 0.05
"""Largest share of the varied inputs that may lie at a threshold inside the network, blank ones apart.

In a blank input all is the same, so that whatever is ranked inside the network may well tie."""

_CERTAIN: Final = 600.0
"""Log-odds past which the oracle's float64 ends."""


def prove_structure(program: Program, plans: Sequence[StagePlan]) -> None:
    """Check that every node with data in it is in exactly one stage, after all it reads.

    Raises:
        SplitError: If not, which no network should be able to cause.
    """
    kinds = classify(program)
    wanted = [i for i, node in enumerate(program.nodes) if any(kinds[n] is Kind.DATA for n in node.output if n)]
    held = [i for plan in plans for i in plan.nodes]
    if sorted(held) != wanted:
        raise SplitError("the stages do not hold every node exactly once; this is a bug")
    known = set(program.inputs)
    for plan in plans:
        inside = {name for i in plan.nodes for name in program.nodes[i].output}
        read = {name for i in plan.nodes for name in values_read(program.nodes[i]) if kinds[name] is Kind.DATA}
        before = {*plan.reads, *(one.skip for one in plan.merges)}
        if not (read <= inside | set(plan.reads) and before <= known and plan.scores in (*inside, None)):
            stage = f"the stage of exit {plan.exit!r}" if plan.exit is not None else "a stage"
            raise SplitError(f"{stage} reads what no earlier stage emits; this is a bug")
        known.update(plan.emits)


def load(bundle: Bundle, device: Device) -> StageExecutor:
    """Load a bundle's stages.

    Raises:
        SplitError: If ONNX Runtime refuses a stage.
    """
    try:
        return StageExecutor(bundle, device)
    except ManifestError as error:
        raise SplitError(f"a stage cannot be run: {error.message}{explain(error.__cause__ or error)}") from error


def prove_parity(executor: StageExecutor, reference: Reference, examples: Examples, batches: Sequence[int]) -> None:
    """Run the bundle and the network beside each other.

    Args:
        executor: What is to be proved, loaded.
        reference: The network.
        examples: Inputs that the network takes; random ones are drawn like them.
        batches: The batch sizes to prove.

    Raises:
        ParityError: Naming exit, stage, tensor and the largest deviation.
        TraceError: If an exit gives probabilities instead of logits.
    """
    proof = _Proof(executor, rounding_of(executor.manifest).tolerance)
    for batch in batches:
        cases = {"the example": examples.with_rows(batch), "random inputs": examples.random(batch, seed=batch)}
        for kind, inputs in cases.items():
            expected = reference(inputs)
            proof.case = f"at batch {batch} on {kind}"
            try:
                proof.compare_exits(inputs, expected)
                proof.compare_survivors(inputs, expected)
            except ParityError:
                _blame_randomness(reference, inputs, expected)
                raise
    refuse_probabilities(executor.manifest.exits, expected)


def prove_covered(executor: StageExecutor, reference: Reference, covered: Examples, batch: int) -> int:
    """Run the bundle and the network beside each other on many inputs.

    Args:
        executor: What is to be proved, loaded.
        reference: The network.
        covered: The inputs. They may lie far from real ones: the tolerance is relative to a row's largest score.
        batch: How many at a time.

    Returns:
        How many of them lie so close to a threshold inside the network that the network itself answers otherwise when
        they change by what rounding may do: there, neither answer is wrong.

    Raises:
        ParityError: Naming exit, stage, tensor and the largest deviation.
    """
    proof, num_flips, num_blank = _Proof(executor, rounding_of(executor.manifest).tolerance, by_row=True), 0, 0
    for start in range(0, covered.num_rows, batch):
        inputs = covered.rows(np.arange(start, start + batch) % covered.num_rows)
        expected = reference(inputs)
        proof.case = f"at batch {batch} on varied inputs"
        differ_B = proof.differing(inputs, expected)
        flips = [row for row in np.flatnonzero(differ_B).tolist() if _is_at_a_threshold(proof, reference, inputs, row)]
        new = [row for row in flips if start + row < covered.num_rows]
        num_flips += len(new)
        num_blank += sum(_is_blank(inputs, row) for row in new)
        if num_flips - num_blank > MAX_FLIPS * covered.num_rows:
            flips = []  # so many are no accident
        steady = np.setdiff1d(np.arange(batch), flips)
        if not len(steady):
            continue
        # A flipped row's place is taken by another: the batch keeps its size.
        rows = steady[np.arange(batch) % len(steady)]
        inputs, expected = inputs.rows(rows), [scores_BC[rows] for scores_BC in expected]
        proof.compare_exits(inputs, expected)
        proof.compare_survivors(inputs, expected)
    return num_flips


def _is_at_a_threshold(proof: "_Proof", reference: Reference, inputs: Examples, row: int) -> bool:
    """Tell whether the network does not equal itself when an input changes by less than rounding does on the way."""
    same = inputs.rows([row] * inputs.num_rows)
    expected = reference(same)
    return any(
        bool(proof.far(scores_BC, expected_BC).any())
        for share in rounding_of(proof.executor.manifest).nudges
        for scores_BC, expected_BC in zip(reference(perturbed(same, share, seed=row)), expected, strict=True)
    )


def _is_blank(inputs: Examples, row: int) -> bool:
    """Tell whether one number is all that a row holds, in every input."""
    return all(bool((array[row] == array[row].flat[0]).all()) for array in inputs.arrays.values() if array[row].size)


@dataclass(slots=True)
class _Proof:
    executor: StageExecutor
    tolerance: float
    case: str = ""
    by_row: bool = False

    def differing(self, inputs: Examples, expected: Sequence[FloatArray]) -> BoolArray:
        """Tell which rows any exit answers otherwise than the network."""
        answers = run_all_exits(self.executor, inputs.arrays)
        far = [self.far(logits_BC, wanted_BC) for (logits_BC, _), wanted_BC in zip(answers, expected, strict=True)]
        return np.asarray(np.any(far, axis=0))

    def far(self, actual_BC: FloatArray, expected_BC: FloatArray) -> BoolArray:
        """Tell which rows of scores lie apart."""
        return np.asarray(~self._are_close(actual_BC, expected_BC, self.tolerance).all(axis=1))

    def _are_close(self, actual_BC: FloatArray, expected_BC: FloatArray, tolerance: float) -> BoolArray:
        if not self.by_row:
            return np.asarray(np.isclose(actual_BC, expected_BC, rtol=tolerance, atol=tolerance, equal_nan=True))
        finite_BC = np.where(np.isfinite(expected_BC), np.abs(expected_BC), 0.0)
        allowed_B1 = tolerance * (1.0 + finite_BC.max(axis=1, keepdims=True))
        is_same_BC = np.isclose(actual_BC, expected_BC, rtol=0.0, atol=0.0, equal_nan=True)
        with np.errstate(invalid="ignore"):
            deviation_BC = np.abs(np.subtract(actual_BC, expected_BC, dtype=np.float64))
        return np.asarray(np.logical_or(is_same_BC, deviation_BC <= allowed_B1))

    def compare_exits(self, inputs: Examples, expected: Sequence[FloatArray]) -> None:
        """Compare every exit's scores with the network's, and its decision with the oracle's."""
        try:
            answers = run_all_exits(self.executor, inputs.arrays)
        except Exception as error:  # ONNX Runtime's errors have no public base
            raise ParityError(f"a stage fails {self.case}{explain(error)}") from error
        for exit_, answer, expected_BC in zip(self.executor.manifest.exits, answers, expected, strict=True):
            logits_BC, decision_BD = answer
            self._require_close(exit_, exit_.logits, logits_BC, expected_BC, self.tolerance)
            oracle_BD = decision_of_logits(logits_BC)
            statistics_BD = decision_BD[:, : oracle_BD.shape[1]]  # a native score may follow
            self._require_close(
                exit_, exit_.decision, _comparable(statistics_BD), _comparable(oracle_BD), SINGLE.tolerance
            )

    def compare_survivors(self, inputs: Examples, expected: Sequence[FloatArray]) -> None:
        """Let rows leave at every boundary: those that stay must answer as if nothing had happened.

        Where there are gates, `run_gated` forms batches anew at every gated stage.
        """
        if self.executor.manifest.gates:
            return
        device, generator = self.executor.device, np.random.default_rng(inputs.num_rows)
        carries: dict[str, DeviceTensor] = {name: device.upload(array) for name, array in inputs.arrays.items()}
        rows = np.arange(inputs.num_rows)
        for index, exit_ in enumerate(self.executor.manifest.exits):
            output = self.executor.run(exit_.stage, carries)
            logits_BC = device.download(output.logits)
            case, self.case = self.case, f"{self.case}, after other rows have left," if index else self.case
            self._require_close(exit_, exit_.logits, logits_BC, expected[index][rows], self.tolerance)
            self.case = case
            num_kept = max(len(rows) * 3 // 4, min(len(rows), self.executor.manifest.min_batch))
            kept = np.sort(generator.choice(len(rows), num_kept, replace=False)).tolist()
            carries = {
                name: device.gather([tensor] * num_kept, kept) for name, tensor in (carries | output.carries).items()
            }
            rows = rows[kept]

    def _require_close(
        self, exit_: Exit, tensor: str, actual: FloatArray, expected: FloatArray, tolerance: float
    ) -> None:
        where = f"exit {exit_.name!r}, stage {self.executor.manifest.stages[exit_.stage].name!r}, tensor {tensor!r}"
        if actual.shape != expected.shape:
            raise ParityError(f"{where}: its shape {self.case} is {actual.shape}, the network's {expected.shape}")
        if not self._are_close(actual, expected, tolerance).all():
            deviation = float(np.abs(np.subtract(actual, expected, dtype=np.float64)).max())
            raise ParityError(
                f"{where}: staged execution {self.case} differs from the network by up to {deviation:.3g}; "
                f"allowed are {tolerance:g} + {tolerance:g}*|value|"
            )


def _comparable(decision_BD: FloatArray) -> FloatArray:
    """Blank the rows that are not numbers, and cut log-odds where the oracle's float64 ends."""
    blanked_BD = np.where(np.isnan(decision_BD).any(axis=1, keepdims=True), np.nan, decision_BD)
    blanked_BD[:, LOG_ODDS] = np.minimum(blanked_BD[:, LOG_ODDS], _CERTAIN)
    return blanked_BD


def _blame_randomness(reference: Reference, inputs: Examples, expected: Sequence[FloatArray]) -> None:
    """Say so where the network does not even equal itself."""
    again = reference(inputs)
    if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(expected, again, strict=True)):
        raise ParityError(
            "the network answers differently when it is called twice with the same input; "
            "make it deterministic and stateless in eval()"
        ) from None


def refuse_probabilities(exits: Sequence[Exit], scores: Sequence[FloatArray]) -> None:
    """Refuse exits whose scores sum to 1 in every row.

    Raises:
        TraceError: Naming the exit.
    """
    for exit_, scores_BC in zip(exits, scores, strict=True):
        sums_to_one = np.allclose(scores_BC.sum(axis=1, dtype=np.float64), 1.0, atol=1e-3)
        if sums_to_one and scores_BC.min() >= 0.0 and scores_BC.max() <= 1.0:
            raise TraceError(
                f"exit {exit_.name!r} gives probabilities (each row sums to 1); "
                "return the logits from before the softmax, or the probabilities' logarithm"
            )
