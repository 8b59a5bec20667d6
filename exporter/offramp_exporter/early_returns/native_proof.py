"""Under its native policy a bundle leaves where the network itself would have returned, with the same answer.

What the bundle's own rules do is read off its stages, so that inputs can be looked for that take every exit; then each
of them is put to the network as it was written, one row at a time.
"""

from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
from offramp_contract.errors import ParityError
from offramp_contract.manifest import Exit, Predicate
from offramp_contract.statistics import Decision, FloatArray
from offramp_runtime import StageExecutor, run_all_exits

from offramp_exporter.coverage import Behaviour, Goal, perturbed
from offramp_exporter.examples import Examples
from offramp_exporter.rounding import rounding_of


class Own(Protocol):
    """The network as it was written, which returns early by itself."""

    @property
    def exits(self) -> tuple[str, ...]:
        """Names of its exits, in order of depth."""

    @property
    def predicates(self) -> tuple[Predicate, ...]:
        """What it asks of its tensors."""

    def own(self, inputs: Examples) -> tuple[int, FloatArray] | None:
        """Give the exit at which one row returns, and its scores (1, C); None if the network raises."""

    def closeness(self, inputs: Examples) -> float:
        """Tell how near the closest of its comparisons of two floats comes to a tie on one row."""

    def behaviour(self, inputs: Examples) -> Behaviour:
        """Tell what it does with some rows."""


MAX_FLIPS: Final = 0.1
"""Largest share of the inputs that may lie so close to a threshold; more are no accident."""


def goal_of(own: Own) -> Goal:
    """Give what is to be seen of a network: every exit, and both answers to everything that it asks."""
    sources = [one.source for one in own.predicates]
    first = [sources.index(source) for source in dict.fromkeys(sources)]  # a line in a loop asks for every exit

    def rules(inputs: Examples) -> Behaviour:
        seen = own.behaviour(inputs)
        return Behaviour(seen.exits_B, seen.answers_BP[:, first])

    return Goal(rules, own.exits, tuple(f"the question at {sources[index]}" for index in first))


def exits_taken(executor: StageExecutor, inputs: Examples) -> npt.NDArray[np.int64]:
    """Tell at which exit each row leaves under the native policy."""
    num_rows = inputs.num_rows
    leaves = [
        exit_.native.sign * _native_scores(decision_BD)[:num_rows] >= exit_.native.bar(exit_.native.threshold)
        for exit_, (_, decision_BD) in _run(executor, inputs)
        if exit_.native is not None
    ]
    return np.asarray(np.stack([*leaves, np.ones(num_rows, dtype=bool)]).argmax(axis=0))


def prove_native(executor: StageExecutor, own: Own, inputs: Examples, tolerance: float) -> int:
    """Put every input to the network as it was written, and compare exit and answer.

    Args:
        executor: The bundle, loaded.
        own: The network.
        inputs: What to put to it.
        tolerance: Of the scores, absolute and relative to the largest of a row.

    Returns:
        How many inputs lie so close to a threshold that rounding decides: there the exits may differ.

    Raises:
        ParityError: Naming the exits that the two took, or how far the answers lie apart.
    """
    num_flips = 0
    for row in range(inputs.num_rows):
        one = inputs.rows([row])
        answer = own.own(one)
        if answer is None:  # it raises, and the bundle answers
            continue
        exit_index, scores_1C = answer
        taken = int(exits_taken(executor, one)[0])
        if taken != exit_index:
            num_flips += 1
            is_excused = _is_near(executor, one) or _is_undecided(executor, own, one, exit_index)
            if not is_excused or num_flips > MAX_FLIPS * inputs.num_rows:
                names = [exit_.name for exit_ in executor.manifest.exits]
                raise ParityError(
                    f"under the native policy an input leaves at {names[taken]!r}, but the network itself returns at "
                    f"{names[exit_index]!r}"
                )
            continue
        exit_, (logits_BC, _) = _run(executor, one)[taken]
        _require_close(logits_BC[:1], scores_1C, exit_.name, tolerance)
    return num_flips


def _require_close(actual_1C: FloatArray, expected_1C: FloatArray, exit_: str, tolerance: float) -> None:
    finite_1C = np.where(np.isfinite(expected_1C), np.abs(expected_1C), 0.0)
    allowed = tolerance * (1.0 + float(finite_1C.max()))
    if (
        actual_1C.shape != expected_1C.shape
        or not np.isclose(actual_1C, expected_1C, rtol=0.0, atol=allowed, equal_nan=True).all()
    ):
        raise ParityError(
            f"exit {exit_!r}: under the native policy the answer differs from what the network itself returns there"
        )


def _is_near(executor: StageExecutor, one: Examples) -> bool:
    """Tell whether any exit's score is within rounding of its threshold."""
    near = rounding_of(executor.manifest).near
    margins = [
        abs(float(_native_scores(decision_BD)[0]) - exit_.native.threshold) - near * abs(exit_.native.threshold)
        for exit_, (_, decision_BD) in _run(executor, one)
        if exit_.native is not None
    ]
    return min(margins) <= near


def _is_undecided(executor: StageExecutor, own: Own, one: Examples, exit_index: int) -> bool:
    """Tell whether the network compares what rounding may turn, or returns elsewhere when the input hardly changes."""
    if own.closeness(one) <= rounding_of(executor.manifest).near:
        return True
    nudged = (perturbed(one, share, seed) for share in rounding_of(executor.manifest).nudges for seed in range(4))
    answers = (own.own(inputs) for inputs in nudged)
    return any(answer is None or answer[0] != exit_index for answer in answers)


def _native_scores(decision_BD: FloatArray) -> npt.NDArray[np.float32]:
    scores_B = Decision(decision_BD).native_B
    if scores_B is None:
        raise ParityError("a stage does not compute the score of its exit's native rule; this is a bug")
    return scores_B


def _run(executor: StageExecutor, inputs: Examples) -> list[tuple[Exit, tuple[FloatArray, FloatArray]]]:
    """Run every stage, with rows repeated where the graphs need more of them."""
    padded = inputs.with_rows(max(inputs.num_rows, executor.manifest.min_batch))
    return list(zip(executor.manifest.exits, run_all_exits(executor, padded.arrays), strict=True))
