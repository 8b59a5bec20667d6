"""Inputs to prove a bundle on: as many as it takes to see every exit taken and every branch answered both ways.

A network that decides for itself is only proved where the proof has been: on the example alone it may always leave at
the same exit. So inputs are varied around what is known to be real (the example, and data if it is given) until every
exit and answer has been seen or the effort is spent, and what was not reached is said. Nothing here knows of torch or
stages: a network is what it answers.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from offramp_exporter.examples import Examples

NOT_ASKED: Final = -1
"""A row that leaves before a question was not asked it."""

_NOISES: Final = (0.01, 0.1, 0.3, 1.0)
_FACTORS: Final = (0.0, 0.1, 0.5, 2.0, 10.0, -1.0)
_OFFSETS: Final = (-3.0, -1.0, 1.0, 3.0)
_SPREADS: Final = (0.1, 0.5, 1.0, 2.0, 5.0)
_BATCH: Final = 8
_BISECTIONS: Final = 12
_PASSES: Final = 3
_EVEN: Final = 1e-12


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the network's own rules do with some rows.

    Attributes:
        exits_B: Index of the exit that each row takes.
        answers_BP: What was answered to each predicate for each row: 1, 0, or `NOT_ASKED`; int8.
    """

    exits_B: npt.NDArray[np.int64]
    answers_BP: npt.NDArray[np.int8]


Rules: TypeAlias = Callable[[Examples], Behaviour]
"""The network's own rules: inputs -> what they do with them."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What is to be seen.

    Attributes:
        rules: The network's own rules.
        exits: The exits' names.
        predicates: What to call each predicate, its source line for one.
    """

    rules: Rules
    exits: Sequence[str]
    predicates: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to look, whichever ends first."""

    max_inputs: int = 400
    max_seconds: float = 20.0


PLAIN_EFFORT: Final = Effort(max_inputs=64, max_seconds=10.0)
"""For a network without rules of its own: there is nothing to look for, only more to prove it on."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """What was tried, and what it reached.

    Attributes:
        inputs: Every input tried.
        exits_B: The exit each of them takes by the network's own rules; None if it has none.
        unreached: What no input did, a sentence each.
    """

    inputs: Examples
    exits_B: npt.NDArray[np.int64] | None = None
    unreached: tuple[str, ...] = ()

    @property
    def num_tried(self) -> int:
        """Count the inputs."""
        return self.inputs.num_rows


def cover(
    examples: Examples,
    goal: Goal | None = None,
    *,
    given: Examples | None = None,
    effort: Effort | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Coverage:
    """Look for inputs that take every exit and get every answer.

    Args:
        examples: Inputs that the network takes.
        goal: What is to be seen; None tries a few inputs of every kind.
        given: Real data, if there is any.
        effort: When to stop.
        clock: Seconds that pass.
    """
    limit = effort or (PLAIN_EFFORT if goal is None else Effort())
    search = _Search(goal, limit, clock() + limit.max_seconds, clock)
    for batch in chain(_variations(examples, given), search.between(), search.mutations()):
        if search.is_over():
            break
        search.attempt(batch)
    return search.result()


@dataclass(slots=True)
class _Search:
    goal: Goal | None
    effort: Effort
    ends_at: float
    clock: Callable[[], float]
    tried: list[Examples] = field(default_factory=list)
    seen: list[Behaviour] = field(default_factory=list)
    num_tried: int = 0

    def attempt(self, inputs: Examples) -> None:
        """See what the network does with some inputs."""
        inputs = inputs.with_rows(min(inputs.num_rows, self.effort.max_inputs - self.num_tried))
        self.tried.append(inputs)
        self.num_tried += inputs.num_rows
        if self.goal is not None:
            self.seen.append(self.goal.rules(inputs))

    def is_over(self) -> bool:
        """Tell whether the effort is spent."""
        return self.num_tried >= self.effort.max_inputs or (bool(self.tried) and self.clock() > self.ends_at)

    def between(self) -> Iterator[Examples]:
        """Go to the boundaries: halve the way between two inputs that the network treats differently."""
        generator = np.random.default_rng(0)
        for _ in range(_PASSES if self.goal is not None else 0):
            for low, high in self._sides():
                if not (low.size and high.size):
                    continue
                yield from self._bisect(int(generator.choice(low)), int(generator.choice(high)), generator)

    def mutations(self) -> Iterator[Examples]:
        """While something has not been seen, change what was seen most rarely."""
        generator = np.random.default_rng(1)
        while self.goal is not None and any(self._unreached(self._together())):
            exits_B = self._together().exits_B
            rarity_B = 1.0 / np.bincount(exits_B - exits_B.min())[exits_B - exits_B.min()]
            rows = generator.choice(len(exits_B), size=_BATCH // 2, p=rarity_B / rarity_B.sum())
            factor, noise, offset = generator.lognormal(), generator.uniform(0, 0.5), generator.normal()
            yield _changed(_joined(self.tried).rows(rows), generator, factor=factor, noise=noise, offset=offset)

    def _bisect(self, low: int, high: int, generator: np.random.Generator) -> Iterator[Examples]:
        inputs, start = _joined(self.tried), self._together()
        a, b = inputs.rows([low]), inputs.rows([high])
        side_a = (start.exits_B[low], *start.answers_BP[low])
        for _ in range(_BISECTIONS):
            middle = _between(a, b, generator)
            yield middle
            reached = self.seen[-1]
            if (reached.exits_B[0], *reached.answers_BP[0]) == side_a:
                a = middle
            else:
                b = middle

    def _sides(self) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Give for each exit but the last, and each predicate, the inputs on either side of it."""
        seen = self._together()
        num_exits = 0 if self.goal is None else len(self.goal.exits)
        splits = [(seen.exits_B <= exit_, seen.exits_B > exit_) for exit_ in range(num_exits - 1)]
        splits += [(answers_B == 0, answers_B == 1) for answers_B in seen.answers_BP.T]
        return [(np.flatnonzero(low), np.flatnonzero(high)) for low, high in splits]

    def _together(self) -> Behaviour:
        return Behaviour(
            np.concatenate([one.exits_B for one in self.seen]), np.concatenate([one.answers_BP for one in self.seen])
        )

    def result(self) -> Coverage:
        """Say what was tried and what was not reached."""
        inputs = _joined(self.tried)
        if self.goal is None:
            return Coverage(inputs)
        seen = self._together()
        return Coverage(inputs, seen.exits_B, tuple(self._unreached(seen)))

    def _unreached(self, seen: Behaviour) -> Iterator[str]:
        if self.goal is None:
            return
        for index, name in enumerate(self.goal.exits):
            if not (seen.exits_B == index).any():
                yield f"{name} was not taken by any of {self.num_tried} inputs tried"
        for index, name in enumerate(self.goal.predicates):
            for answer, word in enumerate(("no", "yes")):
                if not (seen.answers_BP[:, index] == answer).any():
                    yield f"{name} was never answered {word} by {self.num_tried} inputs tried"


def _variations(examples: Examples, given: Examples | None) -> Iterator[Examples]:
    """Give inputs of every kind, a batch each, and then ever more of those that are random."""
    yield examples.with_rows(min(examples.num_rows, _BATCH * 4))
    if given is not None:
        yield from _batches(given)
    real = examples if given is None else given
    for round_ in range(4):
        generator = np.random.default_rng(round_)
        for factor in _FACTORS if round_ == 0 else ():
            yield _changed(real.with_rows(min(real.num_rows, _BATCH)), generator, factor=factor)
        for offset in _OFFSETS:
            rows = real.rows(generator.integers(real.num_rows, size=_BATCH // 4))
            yield _changed(rows, generator, factor=float(round_ % 2), noise=0.1 * round_, offset=offset)
        for noise in _NOISES:
            yield _changed(real.rows(generator.integers(real.num_rows, size=_BATCH // 2)), generator, noise=noise)
        for spread in _SPREADS:
            yield _changed(real.random(_BATCH // 2, seed=int(generator.integers(2**31))), generator, factor=spread)


def _batches(given: Examples) -> Iterator[Examples]:
    """Give up to eight batches of real data, spread over all of it."""
    for rows in np.array_split(np.unique(np.linspace(0, given.num_rows - 1, 8 * _BATCH).astype(int)), 8):
        if rows.size:
            yield given.rows(rows)


def _changed(
    examples: Examples,
    generator: np.random.Generator,
    *,
    factor: float = 1.0,
    noise: float = 0.0,
    offset: float = 0.0,
) -> Examples:
    """Scale the floats, add noise and a number, both in their spread; ids, masks and counts stay what they are."""
    arrays = dict(examples.arrays)
    for name, array in arrays.items():
        if _is_float(array):
            added = _spread(array) * (noise * generator.standard_normal(array.shape) + offset)
            arrays[name] = (factor * array.astype(np.float64) + added).astype(array.dtype)
    return replace(examples, arrays=arrays)


def _spread(array: np.ndarray) -> float:
    """Give the standard deviation; of numbers that are all the same, where it is rounding, their size."""
    spread, size = float(array.std(dtype=np.float64)), float(np.abs(array).mean(dtype=np.float64))
    return spread if spread > _EVEN * size else size or 1.0


def perturbed(examples: Examples, share: float, seed: int) -> Examples:
    """Add noise of a share of their spread to the floats of some inputs."""
    return _changed(examples, np.random.default_rng(seed), noise=share)


def _between(a: Examples, b: Examples, generator: np.random.Generator) -> Examples:
    """Go half of the way: the mean of floats; of all else, each element from one of the two."""
    arrays = {}
    for name, of_a in a.arrays.items():
        of_b = b.arrays[name]
        if _is_float(of_a):
            arrays[name] = ((of_a.astype(np.float64) + of_b) / 2).astype(of_a.dtype)
        else:
            arrays[name] = np.where(generator.random(of_a.shape) < 0.5, of_a, of_b)
    return replace(a, arrays=arrays)


def _joined(parts: Sequence[Examples]) -> Examples:
    names = parts[0].arrays
    return replace(parts[0], arrays={name: np.concatenate([part.arrays[name] for part in parts]) for name in names})


def _is_float(array: np.ndarray) -> bool:
    return bool(np.issubdtype(array.dtype, np.floating))
