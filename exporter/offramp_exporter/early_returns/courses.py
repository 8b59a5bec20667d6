"""Every course that `forward` takes: one per way of answering what it asks of its tensors' values.

What the network does on the example comes first; then one answer at a time is turned round, depth first, until every
course has been taken or there are too many. A course that comes to where the other answer of an earlier question leads
ends there: `if a and b:` has two ways on. A course on which `forward` raises gives no answer and is no exit, unless
what it raised carries one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from offramp_contract.errors import TraceError
from torch import nn

from offramp_exporter.early_returns.asking import Asked, Event, Listening, Retelling, TooManyQuestions, weights_of
from offramp_exporter.early_returns.conditions import Conditions
from offramp_exporter.examples import Examples
from offramp_exporter.exit_paths import walk
from offramp_exporter.exits import ADAPTER
from offramp_exporter.forward_mode import ForwardMode, home_of
from offramp_exporter.refusal import user_line
from offramp_exporter.repeatable import reachable, restored

MAX_COURSES: Final = 64

Answers: TypeAlias = tuple[bool, ...]
"""How the questions so far were answered: the name of a place in a network's code."""


@dataclass(frozen=True, slots=True)
class Course:
    """One way through `forward`.

    Attributes:
        events: What it asked and read.
        returned: What it returned, or what the exception that ended it carried.
        error: What it raised, if that carried no answer.
        hardened: Why it cannot be followed, if it cannot.
        closeness: How near its closest comparison was to a tie.
        joins: The place of the question with which it comes to another course, and of the earlier question whose other
            answer that is.
    """

    events: tuple[Event, ...]
    returned: Any
    error: Exception | None
    hardened: str | None
    closeness: float
    joins: tuple[int, int] | None = None

    @property
    def questions(self) -> tuple[Asked, ...]:
        """What it asked."""
        return tuple(event for event in self.events if isinstance(event, Asked))

    @property
    def answers(self) -> Answers:
        """How it was answered: its name among all courses."""
        return tuple(question.answer for question in self.questions)

    @property
    def own(self) -> Answers:
        """Its answers until it comes to another course."""
        return self.answers if self.joins is None else self.answers[: self.joins[0] + 1]

    @property
    def joined(self) -> Answers:
        """The answers that lead to where its own do."""
        if self.joins is None:
            return self.answers
        earlier = self.joins[1]
        return (*self.answers[:earlier], not self.answers[earlier])


@dataclass(frozen=True, slots=True)
class Courses:
    """All that a network takes.

    Attributes:
        whole: Those that end with an answer or an error.
        joining: Those that come to another course.
    """

    whole: tuple[Course, ...] = ()
    joining: tuple[Course, ...] = ()

    @property
    def returning(self) -> list[Course]:
        """Those that end with an answer."""
        return [course for course in self.whole if course.error is None]

    @property
    def joins(self) -> dict[Answers, Answers]:
        """Answers -> others that lead to the same place, and stand for it."""
        return {course.own: course.joined for course in self.joining}

    def witnesses(self, courses: Sequence[Course]) -> list[Course]:
        """Give joining courses that ask what none of some courses asks."""
        asked = {course.answers[:position] for course in courses for position in range(len(course.answers))}
        found = []
        for course in self.joining:
            own = {course.own[:position] for position in range(len(course.own))}
            if not own <= asked:
                found.append(course)
                asked |= own
        return found


def standing_for(answers: Answers, joins: Mapping[Answers, Answers]) -> Answers:
    """Give the answers that stand for the place to which some lead."""
    place: Answers = ()
    for answer in answers:
        place = (*place, answer)
        while place in joins:
            place = joins[place]
    return place


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A network whose code is followed.

    Attributes:
        network: It, in evaluation mode.
        home: The device of its parameters.
        modules: All that are reachable from it.
        weights: What it computes with that depends on no input.
    """

    network: nn.Module
    home: torch.device
    modules: tuple[nn.Module, ...]
    weights: tuple[torch.Tensor, ...]

    def call(self, examples: Examples, tensors: Sequence[torch.Tensor]) -> Any:
        """Call the network with tensors in the place of its examples."""
        if examples.by_name:
            return self.network(**dict(zip(examples.arrays, tensors, strict=True)), **examples.constants)
        return self.network(*tensors)

    def tensors(self, examples: Examples) -> list[torch.Tensor]:
        """Give examples as tensors on the network's device."""
        return [torch.tensor(array, device=self.home) for array in examples.arrays.values()]


def subject_of(network: nn.Module) -> Subject:
    """Look at a network before its code is followed."""
    modules = tuple(reachable(network))
    weights = tuple(tensor for module in modules for tensor in weights_of(module))
    return Subject(network, home_of(network), modules, weights)


def take(subject: Subject, inputs: Examples, script: Answers = (), conditions: Conditions | None = None) -> Course:
    """Call a network and hear what it asks; what it notes down in attributes is put back afterwards.

    Args:
        subject: The network.
        inputs: One row.
        script: How to answer its first questions.
        conditions: Tells where its course comes to another; None where that is not wanted.

    Raises:
        TraceError: If it asks without end.
    """
    returned: Any = None
    error: Exception | None = None
    tensors = subject.tensors(inputs)
    mode = Listening(subject.weights, script, conditions)
    with torch.no_grad(), restored(subject.network, subject.modules), ForwardMode(subject.home), mode as heard:
        try:
            returned = subject.call(inputs, tensors)
        except TooManyQuestions:
            line = heard.events[-1].line if isinstance(heard.events[-1], Asked) else ""
            raise TraceError(
                f"forward loops until a tensor says so, at {line}, and asks over {len(heard.events) - 1} times; "
                "bound the loop"
            ) from None
        except Exception as raised:  # the network's own code raises what it likes
            returned = carried(raised)
            error = raised if returned is None else None
    return Course(tuple(heard.events), returned, error, heard.hardened, heard.closeness, heard.joins)


def take_again(
    subject: Subject, course: Course, examples: Examples, tensors: Sequence[torch.Tensor]
) -> tuple[Any, list[torch.Tensor]]:
    """Call a network with other tensors, under tracing too, and answer what it asks as on a course.

    Returns:
        What it returned, or what the exception that ended it carried; and the tensor behind each question.
    """
    copies = [tensor.clone() for tensor in tensors]  # a course may write into its input
    mode = Retelling(course.events)
    with restored(subject.network, subject.modules), ForwardMode(subject.home), mode as retold:
        try:
            return subject.call(examples, copies), retold.predicates
        except Exception as raised:  # some networks throw their answer
            returned = carried(raised)
            if returned is None:
                raise
            return returned, retold.predicates


def explore(subject: Subject, inputs: Examples, first: Course) -> Courses:
    """Take every course; none where the network asks nothing of its input's values.

    Args:
        subject: The network.
        inputs: One row.
        first: The course it takes of itself.

    Raises:
        TraceError: If there are more than `MAX_COURSES`, or values of tensors become Python numbers on the way.
    """
    if not first.questions:
        return Courses()
    taken: list[Course] = []
    waiting: list[Answers] = [()]
    while waiting:
        if len(taken) == MAX_COURSES:
            raise TraceError(_too_many(taken))
        script = waiting.pop()
        course = take(subject, inputs, script, Conditions(subject.modules))
        if course.answers[: len(script)] != script:
            raise TraceError(f"forward does not ask the same twice, near {_last_line(course)}; make it deterministic")
        taken.append(course)
        waiting += _turns(course, len(script))
    for course in taken:
        if course.hardened is not None and course.error is None:
            raise TraceError(course.hardened)
    whole = tuple(course for course in taken if course.joins is None)
    return Courses(whole, tuple(course for course in taken if course.joins is not None))


def carried(error: BaseException) -> Mapping[str, Any] | None:
    """Give what an exception carries, if there are scores in it: some networks throw their answer."""
    held = {"args": error.args, **vars(error)}
    return held if any(is_answer(tensor) for _, tensor in walk(held)) else None


def is_answer(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor may be the scores of one row: (1, C), or (C,) where the batch has been squeezed away."""
    *batch, width = tensor.shape or (0,)
    return tensor.is_floating_point() and batch in ([], [1]) and width >= 2


def _turns(course: Course, start: int) -> list[Answers]:
    """Give the scripts that turn one of its own answers round, from a question on; the last one goes deepest."""
    answers = course.own
    return [(*answers[:i], not answers[i]) for i in range(start, len(answers))]


def _too_many(courses: list[Course]) -> str:
    # The line that asks most often is the one in the loop.
    lines = [question.line for course in courses for question in course.questions]
    line = max(set(lines), key=lines.count)
    return (
        f"forward takes over {MAX_COURSES} courses, asking at {line}; it counts, or combines conditions, in Python. "
        f'Let the server count, with the policy {{"kind": "patience", "patience": t}}. {ADAPTER}'
    )


def _last_line(course: Course) -> str:
    if course.questions:
        return course.questions[-1].line
    return user_line([course.error]) or "its start" if course.error is not None else "its start"
