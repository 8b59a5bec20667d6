"""A network as a module that takes the courses it is told to: one, every one, or one for each of its exits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from offramp_exporter.early_returns.answers import scores_at
from offramp_exporter.early_returns.asking import Event, Retelling
from offramp_exporter.early_returns.courses import Answers, Course, Subject, take_again
from offramp_exporter.examples import Examples
from offramp_exporter.exit_paths import ExitPath
from offramp_exporter.forward_mode import plain_calls


class Told(nn.Module):
    """A network that answers what it asks as it was answered before: all other answers raise.

    Args:
        network: It.
        events: What it asked and read.
    """

    def __init__(self, network: nn.Module, events: Sequence[Event]) -> None:
        super().__init__()
        self.network, self.events = network, tuple(events)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Give what the network returns."""
        if torch.compiler.is_dynamo_compiling():  # which cannot trace the mode
            return self.network(*inputs, **named)
        with Retelling(self.events):
            return self.network(*inputs, **named)

    def __getattr__(self, name: str) -> Any:
        """Give the network's own attributes: an exit may lie in one."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)


class EveryExit(nn.Module):
    """A network made to leave at every exit: `forward` gives the tuple of their logits, row by row.

    Args:
        subject: It.
        exits: For each exit the courses that end there, with where their answer lies.
        examples: How it is called.
    """

    def __init__(
        self, subject: Subject, exits: Sequence[Sequence[tuple[Course, ExitPath]]], examples: Examples
    ) -> None:
        super().__init__()
        self.network, self.subject, self.exits, self.examples = subject.network, subject, exits, examples

    def forward(self, *inputs: torch.Tensor, **named: Any) -> tuple[torch.Tensor, ...]:
        """Give the exits' logits, (B, C) each."""
        tensors = [*inputs, *(named[name] for name in self.examples.arrays if name in named)]
        rows = [[tensor[row : row + 1] for tensor in tensors] for row in range(len(tensors[0]))]
        answers = [[self._leave(row, courses) for courses in self.exits] for row in rows]
        return tuple(torch.cat(column) for column in zip(*answers, strict=True))

    def _leave(self, row: list[torch.Tensor], courses: Sequence[tuple[Course, ExitPath]]) -> torch.Tensor:
        for course, path in courses[:-1]:
            try:
                return self._scores(row, course, path)
            except Exception:  # what is no course for this row may raise what it likes
                continue
        return self._scores(row, *courses[-1])

    def _scores(self, row: list[torch.Tensor], course: Course, path: ExitPath) -> torch.Tensor:
        returned, _ = take_again(self.subject, course, self.examples, row)
        return scores_at(path, returned, self.network)


class EveryCourse(nn.Module):
    """A network that takes every course: `forward` gives what each returned, then the questions, each once.

    Args:
        subject: It.
        courses: Those that return.
        paths: Where the answer of each lies.
        witnesses: Others, which ask what those do not.
        examples: How it is called.
    """

    def __init__(
        self,
        subject: Subject,
        courses: Sequence[Course],
        paths: Sequence[ExitPath],
        witnesses: Sequence[Course],
        examples: Examples,
    ) -> None:
        super().__init__()
        self.network, self.subject = subject.network, subject
        self.courses, self.paths, self.witnesses, self.examples = courses, paths, witnesses, examples

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give the logits, (1, C) each, and the questions' answers, (1,) each."""
        scores: list[torch.Tensor] = []
        questions: dict[Answers, torch.Tensor] = {}
        for place, course in enumerate((*self.courses, *self.witnesses)):
            with plain_calls():
                returned, predicates = take_again(self.subject, course, self.examples, inputs)
            if place < len(self.paths):
                scores.append(scores_at(self.paths[place], returned, self.network).clone())
            for position, predicate in enumerate(predicates[: len(course.own)]):
                questions.setdefault(course.answers[:position], predicate.reshape(1).clone())
        return (*scores, *questions.values())


def questions_on(courses: Sequence[Course]) -> list[Answers]:
    """Give the answers before each question, in the order in which `EveryCourse` gives the questions."""
    return list(dict.fromkeys(course.answers[:i] for course in courses for i in range(len(course.own))))
