"""Courses that come to the same place are one, and no others: the oracle takes every course to its end."""

from collections.abc import Callable, Iterator

import pytest
import torch
from offramp_exporter.early_returns.courses import (
    Answers,
    Course,
    Courses,
    Subject,
    explore,
    standing_for,
    subject_of,
    take,
)
from offramp_exporter.examples import Examples
from torch import Tensor, nn

NUM_BLOCKS = 5
ROW = torch.linspace(-1, 1, 6)[None]


class Blocks(nn.Module):
    """Numbers to ask about; what `forward` does with them is the habit."""

    def __init__(self, num_blocks: int = NUM_BLOCKS) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(num_blocks))
        self.count = 0
        self.log: list[int] = []
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


class And(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
            if x.max() > 0.9 and x.min() > -0.5:
                return x
        return x * 2


class Nested(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
            if x.max() > 0.9:  # noqa: SIM102  (people write it)
                if x.min() > -0.5:
                    return x
        return x * 2


class AndOr(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[:3]:
            x = block(x).tanh()
            if x.max() > 0.9 and (x.min() > -0.5 or not x.mean() > 0.1):
                return x
        return x * 2


class Otherwise(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[:3]:
            x = block(x).tanh()
            if x.max() > 0.9 and x.min() > -0.5:
                return x
            elif x.mean() > 0 or x.std() < 0.1:  # noqa: RET505  (people write it)
                x = x + 1
            else:
                x = x - 1
        return x * 2


class HelpsItself(Blocks):
    def is_clear(self, x: Tensor) -> Tensor:
        top = x.topk(2)[0][0]
        return top[0] - top[1] > 0.1

    def forward(self, x: Tensor) -> Tensor:
        for index in range(len(self.blocks)):
            x = self.blocks[index](x).tanh()
            if x.max() > 0.9 and self.is_clear(x):
                return x
        return x * 2


class While(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        index = 0
        while index < 4 and not (x.max() > 0.9 and x.min() > -0.5):
            x = self.blocks[index](x).tanh()
            index += 1
        return x


class AsksTheSameTwice(Blocks):
    def is_sure(self, x: Tensor) -> Tensor:
        return x.max() > 0.9 and x.min() > -0.5  # type: ignore[return-value]  # a tensor, either of two

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x).tanh()
        sure = x.max() > 0.9
        if sure:
            x = x + 1
        if sure and self.is_sure(x):
            return x
        return x * 2


class Votes(Blocks):
    """Joins nothing: the answers live on."""

    def forward(self, x: Tensor) -> Tensor:
        votes = []
        for block in self.blocks[:3]:
            x = block(x).tanh()
            votes.append(bool(x.max() > 0.9) + bool(x.min() > -0.5))
        return x * sum(votes)


class Counts(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        counter = 0
        for block in self.blocks:
            x = block(x).tanh()
            counter = counter + 1 if x.max() > 0.9 else 0
            if counter == 2:
                return x
        return x * counter


class Remembers(Blocks):
    """The second half of the condition writes down that it was asked."""

    def noted(self, answer: Tensor) -> Tensor:
        self.count += 1
        return answer

    def forward(self, x: Tensor) -> Tensor:
        self.count = 0
        for block in self.blocks[:3]:
            x = block(x).tanh()
            if x.max() > 0.9 and self.noted(x.min() > -0.5):
                return x
        return x * self.count


class Appends(Blocks):
    def noted(self, answer: Tensor, log: list[int]) -> Tensor:
        log.append(1)
        return answer

    def forward(self, x: Tensor) -> Tensor:
        logs: dict[str, list[int]] = {"asked": []}
        for block in self.blocks[:3]:
            x = block(x).tanh()
            if x.max() > 0.9 and self.noted(x.min() > -0.5, logs["asked"]):
                return x
        return x * len(logs["asked"])


class WritesInPlace(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(1)
        for block in self.blocks[:3]:
            x = block(x).tanh()
            if x.max() > 0.9 and total.add_(1) * x.min() > -0.5:
                return x
        return x * total


class Walrus(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        low = x.mean()
        for block in self.blocks[:3]:
            x = block(x).tanh()
            if x.max() > 0.9 and (low := x.min()) > -0.5:
                return x
        return x * low


class TakesTheNext(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        numbers = iter([-0.5, -0.4, -0.3, -0.2])
        for block in self.blocks[:3]:
            x = block(x).tanh()
            if x.max() > 0.9 and x.min() > next(numbers):
                return x
        return x * next(numbers)


class TakesTheNextInALoop(Blocks):
    """The iterator is nowhere but on Python's stack."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x).tanh()
        for _ in (None, None, None):
            if x.max() > 0.9:
                continue
            x = x * 2
        return x


class AsksInTurn(Blocks):
    """How far the loop has come is nowhere but on Python's stack, and its two questions lead to the same line."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks[0](x).tanh()
        high, low = y.max() > 0.9, y.min() < -0.5
        for turn in (0, 1):
            if turn == 0:
                turn = 9  # noqa: PLW2901  (so that both questions find the same)
                if high:
                    continue
            else:
                turn = 9  # noqa: PLW2901
                if low:
                    continue
            y = y * 2
        return y


class OnTheStack(Blocks):
    """What was answered is nowhere but on Python's stack while the next question is asked."""

    def forward(self, x: Tensor) -> Tensor:
        return x * ((2 if x.max() > 0.9 else 3) + (5 if x.min() > -0.5 else 7) * (11 if x.mean() > 0 else 13))


def every_course(subject: Subject, inputs: Examples, script: Answers = ()) -> Iterator[Course]:
    """Take every course to its end."""
    course = take(subject, inputs, script)
    yield course
    for place in range(len(script), len(course.answers)):
        yield from every_course(subject, inputs, (*course.answers[:place], not course.answers[place]))


def explored(kind: Callable[[], nn.Module]) -> tuple[Subject, Examples, Courses]:
    subject, inputs = subject_of(kind().eval()), Examples({"x": ROW.numpy()})
    return subject, inputs, explore(subject, inputs, take(subject, inputs))


MERGING = [And, Nested, AndOr, Otherwise, HelpsItself, While, AsksTheSameTwice]
REMEMBERING = [
    *(
        Votes,
        Counts,
        Remembers,
        Appends,
        WritesInPlace,
        Walrus,
        TakesTheNext,
        TakesTheNextInALoop,
        AsksInTurn,
        OnTheStack,
    ),
]


@pytest.mark.parametrize("kind", [*MERGING, *REMEMBERING], ids=lambda kind: kind.__name__)
def test_every_course_ends_as_the_one_that_stands_for_it(kind: type[nn.Module]) -> None:
    subject, inputs, courses = explored(kind)
    ends = {course.answers: course.returned for course in courses.whole}

    reached = set()
    for course in every_course(subject, inputs):
        place = standing_for(course.answers, courses.joins)
        reached.add(place)
        assert torch.equal(ends[place], course.returned)
    assert reached == set(ends)


@pytest.mark.parametrize("kind", MERGING[:-1], ids=lambda kind: kind.__name__)
def test_courses_that_come_together_are_taken_once(kind: type[nn.Module]) -> None:
    subject, inputs, courses = explored(kind)

    assert courses.joining
    assert len(courses.whole) + len(courses.joining) < len(list(every_course(subject, inputs)))


@pytest.mark.parametrize(("num_exits", "most"), [(2, 5), (8, 17), (20, 41)])
def test_the_courses_of_an_and_grow_with_the_number_of_exits_alone(num_exits: int, most: int) -> None:
    _, _, courses = explored(lambda: And(num_exits))

    assert len(courses.whole) == num_exits + 1
    assert len(courses.whole) + len(courses.joining) <= most


@pytest.mark.parametrize("kind", REMEMBERING, ids=lambda kind: kind.__name__)
def test_what_is_remembered_keeps_courses_apart(kind: type[nn.Module]) -> None:
    assert not explored(kind)[2].joining


def test_one_tensor_is_asked_once() -> None:
    questions = [course.questions for course in explored(AsksTheSameTwice)[2].whole]

    assert max(map(len, questions)) == 3


def test_what_only_joining_courses_ask_is_asked_by_a_witness() -> None:
    courses = explored(AndOr)[2]
    alone = {course.answers[:place] for course in courses.whole for place in range(len(course.answers))}
    together = [*courses.whole, *courses.witnesses(courses.whole)]

    asked = {course.answers[:place] for course in together for place in range(len(course.own))}
    assert asked > alone
    assert asked == {
        course.own[:place] for course in (*courses.whole, *courses.joining) for place in range(len(course.own))
    }
