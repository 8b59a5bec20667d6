"""Networks that return early: every course through `forward` in one program, and the rule by which each exit is taken.

`if conf > t: return logits` leaves Python to decide where a row goes. Every course is taken on the example, then traced
once more inside one export that answers alike, so that the program holds all that the network may return and all that
it asks; what courses share is computed once. The network is traced with one row, which is what its code is written
for, and the batch put in afterwards.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from offramp_contract.errors import ParityError, TraceError
from offramp_contract.manifest import NativeRule, Predicate
from offramp_contract.statistics import FloatArray
from onnx import ModelProto, helper
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from torch import nn

from offramp_exporter.coverage import NOT_ASKED, Behaviour
from offramp_exporter.decompositions import decomposed
from offramp_exporter.early_returns.answers import answer_paths, scores_at
from offramp_exporter.early_returns.courses import Answers, Course, Courses, Subject, carried, standing_for, take
from offramp_exporter.early_returns.exit_rules import (
    Leaf,
    NetworkExit,
    Rule,
    asked_in,
    exits_of,
    predicates_of,
    rules_of,
)
from offramp_exporter.early_returns.native_score import ScoreWriter, comparisons_in
from offramp_exporter.early_returns.retold import EveryCourse, EveryExit, questions_on
from offramp_exporter.examples import Examples
from offramp_exporter.exit_paths import ExitPath
from offramp_exporter.exits import ExitNames
from offramp_exporter.forward_mode import ForwardMode, home_of
from offramp_exporter.program import Program, program_of_model
from offramp_exporter.quiet import overhearing
from offramp_exporter.refusal import refusal
from offramp_exporter.repeatable import prove_repeatable
from offramp_exporter.rows.batch import per_row
from offramp_exporter.rows.one_row import OneRow, deduplicated
from offramp_exporter.rows.rules import rule_of
from offramp_exporter.translations import translate

_NATIVE: Final = ".native"
"""Behind an exit's name: the program's value that holds its native score."""


@dataclass(frozen=True, slots=True)
class EagerAnswer:
    """What the network itself does with one row.

    Attributes:
        exit_index: The exit that it takes; None where it raises.
        exit_name: Its name.
        logits_BC: What it answers, (1, C).
        predicates: Each question that it asked, as an index into `EarlyReturns.predicates`, and the answer.
        closeness: How near its closest comparison of two floats was to a tie.
    """

    exit_index: int | None
    exit_name: str | None
    logits_BC: FloatArray | None
    predicates: Mapping[int, bool]
    closeness: float


@dataclass(frozen=True, slots=True)
class EarlyReturns:
    """How a network leaves by itself.

    Attributes:
        subject: It, as it was given.
        rules: The rule of every exit but the final one, by name.
        predicates: What it asks.
        exits: Names of its exits, in order.
    """

    subject: Subject
    rules: Mapping[str, NativeRule]
    predicates: tuple[Predicate, ...]
    exits: tuple[str, ...]
    _ends: Mapping[Answers, tuple[int, ExitPath]]
    _asked_after: Mapping[Answers, int]
    _joins: Mapping[Answers, Answers]

    def eager(self, inputs: Examples) -> EagerAnswer:
        """Call the network itself with one row and see where it returns.

        Raises:
            ParityError: If it takes a course that is not known.
        """
        course = take(self.subject, inputs)
        asked = self._asked(course)
        if course.error is not None:
            return EagerAnswer(None, None, None, asked, course.closeness)
        end = self._ends.get(standing_for(course.answers, self._joins))
        if end is None:
            lines = ", ".join(question.line for question in course.questions) or "no line"
            raise ParityError(f"the network takes a course that was not seen when it was traced, asking at {lines}")
        index, path = end
        scores_BC = scores_at(path, course.returned, self.subject.network).detach().cpu().numpy()
        return EagerAnswer(index, self.exits[index], scores_BC, asked, course.closeness)

    def own(self, inputs: Examples) -> tuple[int, FloatArray] | None:
        """Give the exit that one row takes and what it is answered there; None if the network raises."""
        answer = self.eager(inputs)
        if answer.exit_index is None or answer.logits_BC is None:
            return None
        return answer.exit_index, answer.logits_BC

    def closeness(self, inputs: Examples) -> float:
        """Tell how near the closest of its comparisons of two floats comes to a tie on one row."""
        return self.eager(inputs).closeness

    def notes(self) -> list[str]:
        """Say what a person should know, a sentence each."""
        rules = [f"{name} {rule} at {'; '.join(rule.sources)}" for name, rule in self.rules.items()]
        return [
            f"returns early by rules of its own, which the policy native applies to each row alone: {', '.join(rules)}",
            *filter(None, map(raising_note, self.predicates)),
        ]

    def behaviour(self, inputs: Examples) -> Behaviour:
        """Tell what the network itself does with some rows, one at a time; a row on which it raises has exit -1."""
        answers = [self.eager(inputs.rows([row])) for row in range(inputs.num_rows)]
        exits_B = np.array([-1 if one.exit_index is None else one.exit_index for one in answers], dtype=np.int64)
        answers_BP = np.array(
            [[one.predicates.get(index, NOT_ASKED) for index in range(len(self.predicates))] for one in answers],
            dtype=np.int8,
        )
        return Behaviour(exits_B, answers_BP.reshape(inputs.num_rows, len(self.predicates)))

    def _asked(self, course: Course) -> dict[int, bool]:
        places = (standing_for(course.answers[:position], self._joins) for position in range(len(course.answers)))
        known = zip(map(self._asked_after.get, places), course.answers, strict=True)
        return {index: answer for index, answer in known if index is not None}


def raising_note(predicate: Predicate) -> str | None:
    """Say on which answer a network raises, if it does on one."""
    if predicate.raises_on is None:
        return None
    return (
        f"raises where the answer is {'yes' if predicate.raises_on else 'no'} at {predicate.source}; a bundle answers"
    )


@dataclass(frozen=True, slots=True)
class EarlyTrace:
    """A traced network that returns early.

    Attributes:
        program: Its exits and native scores as one graph.
        network: It as a module that leaves at every exit.
        paths: Where the answer lies in what `forward` returned, by the exit's name.
        returns: How it leaves by itself.
    """

    program: Program
    network: nn.Module
    paths: dict[str, str]
    returns: EarlyReturns


def trace_early_returns(
    subject: Subject, examples: Examples, courses: Courses, exits: ExitNames | None, num_classes: int | None
) -> EarlyTrace:
    """Trace a network that returns early.

    Args:
        subject: It.
        examples: One row that it takes.
        courses: All that it takes; more than one returns.
        exits: Where the answer lies in what `forward` returns, if it returns several tensors like scores.
        num_classes: The number of classes, if known.

    Raises:
        TraceError: Saying what stands in the way and what to do.
    """
    network = subject.network
    returning = courses.returning
    witnesses = courses.witnesses(returning)
    paths = answer_paths(returning, network, exits, num_classes)
    prove_repeatable(lambda: _called(network, examples), {"answer": paths[0]}, network)
    model = _to_onnx(EveryCourse(subject, returning, paths, witnesses, examples), examples)
    values = list(deduplicated(model).values())
    scores, questions = (
        values[: len(returning)],
        dict(zip(questions_on([*returning, *witnesses]), values[len(returning) :], strict=True)),
    )
    graph = OneRow(model)
    leaves = [
        Leaf(course.answers, value, graph.cost([value]), graph.cost([value, *_on_the_way(course, questions)]))
        for course, value in zip(returning, scores, strict=True)
    ]
    named = {f"exit_{index}": exit_ for index, exit_ in enumerate(exits_of(leaves))}
    comparisons = comparisons_in(graph, iter(questions.values()))
    predicates, asked_after = predicates_of(courses, named, questions, comparisons)
    lines = _lines([*returning, *witnesses], questions)
    rules = _write_exits(graph, named, rules_of(list(named.values()), questions, courses.joins), lines)
    natives = {name: f"{name}{_NATIVE}" for name in rules}
    program = program_of_model(per_row(graph, rule_of), {name: f"{name}.scores" for name in named}, natives=natives)
    ends = {course.answers: (course, path) for course, path in zip(returning, paths, strict=True)}
    places = {a: (index, ends[a][1]) for index, exit_ in enumerate(named.values()) for a in exit_.leaves}
    return EarlyTrace(
        program,
        EveryExit(subject, [[ends[a] for a in exit_.leaves] for exit_ in named.values()], examples).eval(),
        {name: str(ends[exit_.leaves[0]][1]) for name, exit_ in named.items()},
        EarlyReturns(subject, rules, predicates, tuple(named), places, asked_after, courses.joins),
    )


def _called(network: nn.Module, examples: Examples) -> Any:
    with ForwardMode(home_of(network)):
        try:
            return examples.call(network)
        except Exception as raised:  # some networks throw their answer
            returned = carried(raised)
            if returned is None:
                raise
            return returned


def _on_the_way(course: Course, questions: Mapping[Answers, str]) -> Iterator[str]:
    return (questions[course.answers[:position]] for position in range(len(course.own)))


def _lines(courses: Sequence[Course], questions: Mapping[Answers, str]) -> dict[str, str]:
    """Give the line of each question."""
    lines: dict[str, str] = {}
    for course in courses:
        for value, asked in zip(_on_the_way(course, questions), course.questions, strict=False):
            lines.setdefault(value, asked.line)
    return lines


def _write_exits(
    graph: OneRow,
    exits: Mapping[str, NetworkExit],
    exit_rules: Sequence[Rule],
    lines: Mapping[str, str],
) -> dict[str, NativeRule]:
    """Make the exits' scores and native scores the graph's outputs; give the rules."""
    writer, rules = ScoreWriter(graph), {}
    model = graph.model
    outputs = []
    for (name, exit_), rule in zip(exits.items(), exit_rules, strict=True):
        model.graph.node.append(helper.make_node("Identity", [exit_.scores], [f"{name}.scores"]))
        shape = graph.shapes[exit_.scores]
        outputs.append(helper.make_tensor_value_info(f"{name}.scores", graph.dtypes[exit_.scores], shape))
        if rule is not True:
            sources = tuple(dict.fromkeys(lines[value] for value in asked_in(rule)))
            rules[name] = writer.write(rule, f"{name}{_NATIVE}", sources)
            outputs.append(helper.make_tensor_value_info(f"{name}{_NATIVE}", 1, [1, 1]))
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    graph.refresh()
    return rules


def _to_onnx(module: nn.Module, examples: Examples) -> ModelProto:
    tensors = tuple(torch.tensor(array, device=home_of(module)) for array in examples.arrays.values())
    with overhearing() as overheard, torch.no_grad():
        try:
            exported = decomposed(torch.export.export(module.eval(), tensors, strict=False))
            written = translate(exported, list(examples.arrays), optimize=False)
            if written is not None:
                # First: what two courses share would be folded into different weights.
                CommonSubexpressionEliminationPass()(written.model)
                written.optimize()
        except TraceError:
            raise
        except Exception as error:  # torch raises what it likes, and the network's own code what it likes
            failure = error
        else:
            if written is not None:
                model: ModelProto = written.model_proto
                return model
            failure = RuntimeError("nothing was written")
    raise refusal([failure], overheard.line) from failure
