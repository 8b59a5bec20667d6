"""Courses -> exits in order, and the rule by which the network itself leaves at each.

The courses form a tree of questions with what `forward` returned at its leaves. Leaves that return the same tensor are
one exit. A row takes exactly one leaf, so at exit k, where no earlier leaf was the row's, a question decides something
only if both of its sides still lead to different ends: what is left of the tree is the exit's rule.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from offramp_contract.native import Predicate

from offramp_exporter.early_returns.asking import Asked
from offramp_exporter.early_returns.courses import Answers, Course, Courses, standing_for


@dataclass(frozen=True, slots=True)
class Choice:
    """A question, as the value that answers it, and what holds after yes and after no."""

    question: str
    yes: "Rule"
    no: "Rule"


Rule: TypeAlias = bool | Choice | None
"""Whether a row leaves; None where no row can be."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """The end of a course.

    Attributes:
        answers: How its questions were answered.
        scores: The value that it returned; None where it raised.
        scores_cost: Operations that this value takes.
        cost: Operations that the value and all questions on the way take.
    """

    answers: Answers
    scores: str | None
    scores_cost: int
    cost: int


@dataclass(frozen=True, slots=True)
class NetworkExit:
    """Leaves that return one value.

    Attributes:
        scores: The value.
        leaves: Their answers.
    """

    scores: str
    leaves: tuple[Answers, ...]


def exits_of(leaves: Sequence[Leaf]) -> list[NetworkExit]:
    """Make exits of the leaves that return, in the order of what they cost.

    A leaf is as deep as the dearest score that costs no more than it: questions asked late put off a cheap answer.
    Leaves of one depth that return the same value are one exit. Of exits that cost the same, the one that is asked for
    first comes first, and what follows a yes before what follows a no.
    """
    returning = [(leaf, leaf.scores) for leaf in leaves if leaf.scores is not None]
    costs = {scores: leaf.scores_cost for leaf, scores in returning}
    levels = sorted(set(costs.values()))
    grouped: dict[tuple[int, int, str], list[Leaf]] = {}
    for leaf, scores in returning:
        depth = max(level for level in levels if level <= leaf.cost)
        grouped.setdefault((depth, costs[scores], scores), []).append(leaf)
    ordered = sorted(grouped.items(), key=lambda one: (*one[0][:2], min(map(_place, one[1]))))
    return [NetworkExit(scores, tuple(leaf.answers for leaf in leaves)) for (_, _, scores), leaves in ordered]


def _place(leaf: Leaf) -> tuple[int, Answers]:
    return leaf.cost, tuple(not answer for answer in leaf.answers)


def rules_of(
    exits: Sequence[NetworkExit], questions: Mapping[Answers, str], joins: Mapping[Answers, Answers]
) -> list[Rule]:
    """Give the rule of every exit, the final one's too.

    Args:
        exits: In order.
        questions: The value behind the question that follows after some answers; those on the way to exits.
        joins: See `Courses.joins`.
    """
    places = {answers: index for index, exit_ in enumerate(exits) for answers in exit_.leaves}

    def rule(answers: Answers, exit_index: int, known: dict[Answers, Rule]) -> Rule:
        answers = standing_for(answers, joins)
        if answers in places:
            return None if places[answers] < exit_index else places[answers] == exit_index
        if answers not in questions:
            return None  # it raised
        if answers not in known:
            yes, no = (rule((*answers, answer), exit_index, known) for answer in (True, False))
            if yes is None or no is None or yes == no:
                known[answers] = no if yes is None else yes
            else:
                known[answers] = Choice(questions[answers], yes, no)
        return known[answers]

    return [rule((), index, {}) for index in range(len(exits))]


def asked_in(rule: Rule) -> dict[str, None]:
    """Name the questions of a rule, in order, each once."""
    return {rule.question: None} | asked_in(rule.yes) | asked_in(rule.no) if isinstance(rule, Choice) else {}


@dataclass(slots=True)
class _Question:
    asked: Asked
    comparison: str | None
    answers: list[set[bool]]
    returning: set[bool]
    raising: set[bool]


def predicates_of(
    courses: Courses,
    exits: Mapping[str, NetworkExit],
    questions: Mapping[Answers, str],
    comparisons: Mapping[str, str],
) -> tuple[tuple[Predicate, ...], dict[Answers, int]]:
    """Write down for people what was asked, where, and what was answered on the way to each exit.

    Args:
        courses: All of them.
        exits: By name, in order.
        questions: See `rules_of`; questions that are not there lead to no exit.
        comparisons: What a question compares, where it compares with a constant.

    Returns:
        The predicates; and which of them follows after some answers.
    """
    found: dict[tuple[str, str], _Question] = {}
    order: list[tuple[str, str]] = []
    places = {answers: index for index, exit_ in enumerate(exits.values()) for answers in exit_.leaves}
    asked_after: dict[Answers, tuple[str, str]] = {}
    for course in (*courses.whole, *courses.joining):
        ends = _ends_of(course, courses, places)
        previous = -1
        for position, asked in enumerate(course.questions[: len(course.own)]):
            before = course.answers[:position]
            value = questions.get(before, "")
            key = asked_after[before] = (asked.line, value)
            if key not in found:
                found[key] = _Question(asked, comparisons.get(value), [set() for _ in exits], set(), set())
                order.insert(previous + 1, key)
            previous = order.index(key)
            if None in ends:
                found[key].raising.add(asked.answer)
            if ends - {None}:
                found[key].returning.add(asked.answer)
            for index in ends - {None}:
                found[key].answers[index].add(asked.answer)  # type: ignore[index]  # without None
    predicates = tuple(
        Predicate(
            source=question.asked.line,
            comparison=question.comparison,
            answers=dict(zip(exits, map(_only, question.answers), strict=True)),
            raises_on=_only(question.raising - question.returning),
        )
        for question in (found[key] for key in order)
    )
    return predicates, {answers: order.index(key) for answers, key in asked_after.items()}


def _ends_of(course: Course, courses: Courses, places: Mapping[Answers, int]) -> set[int | None]:
    """Give the exits to which a course may lead; None stands for an error."""
    if course.joins is None:
        return {None if course.error is not None else places[course.answers]}
    start = standing_for(course.joined, courses.joins)
    behind = [other for other in (*courses.whole, *courses.joining) if other.own[: len(start)] == start]
    return set().union(*(_ends_of(other, courses, places) for other in behind))


def _only(answers: set[bool]) -> bool | None:
    return next(iter(answers)) if len(answers) == 1 else None
