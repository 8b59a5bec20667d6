"""Module -> one ONNX program whose outputs are all exits.

The module is called once, to see what it returns, and traced with a dynamic batch. What torch's exporters write is read
back: they may make the batch static without a word. Nothing here knows of stages.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from offramp_contract.errors import TraceError
from offramp_contract.manifest import Predicate
from onnx import ModelProto
from torch import nn

from offramp_exporter.decompositions import decomposed
from offramp_exporter.depth_order import in_order_of_depth
from offramp_exporter.early_returns.courses import Course, Courses, Subject, explore, subject_of, take
from offramp_exporter.early_returns.early_return import EarlyReturns, raising_note, trace_early_returns
from offramp_exporter.early_returns.retold import Told
from offramp_exporter.examples import ExampleInputs, Examples, read_examples
from offramp_exporter.exit_paths import ExitPath
from offramp_exporter.exits import Chosen, ExitNames, choose_exits, is_square_stack, with_probabilities
from offramp_exporter.forward_mode import ForwardMode, home_of, plain_calls
from offramp_exporter.garbage import collected_later
from offramp_exporter.gating.returned import choose_gates, mark_decisions, prove_used
from offramp_exporter.hard_decisions import hard_decisions
from offramp_exporter.program import Program, program_of_model
from offramp_exporter.quiet import overhearing
from offramp_exporter.refusal import StaticBatch, explain, is_data_dependent, refusal
from offramp_exporter.repeatable import prove_repeatable, reachable, restored
from offramp_exporter.staged import staged_parts
from offramp_exporter.translations import translate

_TRACE_ROWS: Final = 2
"""Rows of the traced example at least: torch takes a size of 1 for a constant, and some networks drop it."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A traced network.

    Attributes:
        program: It as one ONNX graph.
        network: It as a module that returns the tuple of its exits' logits; what the stages must equal.
        examples: The inputs it was traced with.
        paths: Where in what `forward` returned each exit was found, by the exit's name.
        notes: What a person should know of how the network was read, a sentence each.
        returns: How the network leaves by itself; None if it returns every exit, always.
        predicates: What its code asks of its tensors, and what was answered.
    """

    program: Program
    network: nn.Module
    examples: Examples
    paths: dict[str, str]
    notes: tuple[str, ...] = ()
    returns: EarlyReturns | None = None
    predicates: tuple[Predicate, ...] = ()


class ExitsOnly(nn.Module):
    """A network reduced to its exits: `forward` gives the tuple of the tensors at some paths of what it returned."""

    def __init__(self, network: nn.Module, paths: Sequence[ExitPath], examples: Examples) -> None:
        super().__init__()
        self.network, self.paths, self.constants = network, tuple(paths), dict(examples.constants)
        self.names = tuple(examples.arrays) if examples.by_name else None

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give the exits' logits."""
        if torch.compiler.is_dynamo_compiling():  # which cannot trace the mode
            return self._exits(inputs)
        with plain_calls(), ForwardMode(home_of(self.network)):
            return self._exits(inputs)

    def _exits(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if self.names is None:
            returned = self.network(*inputs)
        else:
            returned = self.network(**dict(zip(self.names, inputs, strict=True)), **self.constants)
        return tuple(path.find(returned, self.network) for path in self.paths)


def trace(
    module: nn.Module,
    example_inputs: ExampleInputs,
    exits: ExitNames | None = None,
    num_classes: int | None = None,
    gates: ExitNames | None = None,
) -> Trace:
    """Trace a module into one program of all its exits.

    Args:
        module: Its `forward` returns its exits; or it has `stages` and `exit_heads`.
        example_inputs: What it takes.
        exits: Which of the returned tensors are exits; see `offramp_exporter.exits.choose_exits`.
        num_classes: Width of an exit, if known.
        gates: Which of the returned tensors are decisions of gates; those of `offramp_models.gates.gate` are found.

    Raises:
        TraceError: Saying what stands in the way and what to do.
    """
    examples = read_examples(module, example_inputs)
    with evaluating(module), collected_later():
        _refuse_scripts(module)
        subject, one_row = subject_of(module), examples.with_rows(1)
        first = take(subject, one_row)
        courses = Courses() if first.error is not None else explore(subject, one_row, first)
        if len(courses.returning) > 1:
            return _trace_early(subject, examples, courses, exits, num_classes)
        try:
            told = Told(module, first.events).eval() if _is_told(first) else module
            return _with_checks(_trace(told, examples, exits, num_classes, gates), courses.returning)
        except TraceError as error:
            if first.hardened is None:
                raise
            raise TraceError(first.hardened) from error


def _with_checks(traced: Trace, returning: Sequence[Course]) -> Trace:
    """Note the questions of a network with one way to answer each: the other way, it raises."""
    asked = [question for course in returning for question in course.questions]
    checks = tuple(dict.fromkeys((question.line, not question.answer) for question in asked))
    predicates = tuple(Predicate(source=line, raises_on=raises_on) for line, raises_on in checks)
    notes = [note for note in map(raising_note, predicates) if note is not None]
    return replace(traced, predicates=predicates, notes=(*traced.notes, *notes))


def _is_told(first: Course) -> bool:
    """Tell whether what the network asks and reads on its one course can be answered for it."""
    return bool(first.events) and first.error is None and first.hardened is None


def _trace_early(
    subject: Subject, examples: Examples, courses: Courses, exits: ExitNames | None, num_classes: int | None
) -> Trace:
    traced = trace_early_returns(subject, examples.with_rows(1), courses, exits, num_classes)
    return Trace(
        traced.program,
        traced.network,
        examples,
        traced.paths,
        (*_hard_notes(traced.program), *traced.returns.notes()),
        traced.returns,
        traced.returns.predicates,
    )


def _trace(
    module: nn.Module,
    examples: Examples,
    exits: ExitNames | None,
    num_classes: int | None,
    gates: ExitNames | None,
) -> Trace:
    rows = _rows_to_trace(module, examples)
    module, returned = _call(module, rows)
    if is_square_stack(returned, rows.num_rows):
        rows = examples.with_rows(rows.num_rows + 1)
        module, returned = _call(module, rows)
    decisions = {} if gates is None else choose_gates(returned, rows.num_rows, gates, module)
    chosen = choose_exits(returned, rows.num_rows, exits, num_classes, module, apart=decisions.values())
    prove_repeatable(lambda: _call(module, rows)[1], chosen.paths, module)
    paths = _read_as_logits(module, returned, chosen.paths, rows)
    model = _to_onnx(ExitsOnly(module, (*paths.values(), *decisions.values()), examples).eval(), rows)
    outputs = [value.name for value in model.graph.output]
    if decisions:
        model = mark_decisions(model, dict(zip(decisions, outputs[len(paths) :], strict=True)))
    named = dict(zip(paths, outputs, strict=False))
    program = program_of_model(model, named, is_one_row=rows.num_rows == 1)
    if decisions:
        prove_used(program, model)
    if chosen.is_proposed:
        program = in_order_of_depth(program)
    paths = {name: paths[name] for name in program.exits}
    return Trace(
        program,
        ExitsOnly(module, tuple(paths.values()), examples).eval(),
        Examples(examples.arrays),
        {name: str(path) for name, path in paths.items()},
        _notes(program, chosen, paths),
    )


def _rows_to_trace(module: nn.Module, examples: Examples) -> Examples:
    """Give two rows at least; or one, if the network takes no more."""
    rows = examples.with_rows(max(_TRACE_ROWS, examples.num_rows))
    try:
        _call(module, rows)
    except TraceError as failure:
        try:
            _call(module, examples.with_rows(1))
        except TraceError:
            raise failure from failure.__cause__
        return examples.with_rows(1)
    return rows


def _refuse_scripts(module: nn.Module) -> None:
    for name, each in module.named_modules():
        if isinstance(each, torch.jit.ScriptModule):
            raise TraceError(
                f"{f'module {name!r}' if name else 'the network'} is TorchScript, which cannot be traced again; make "
                "it from its Python class and load its weights with load_state_dict(script.state_dict())"
            )


def _read_as_logits(
    module: nn.Module, returned: Any, paths: dict[str, ExitPath], rows: Examples
) -> dict[str, ExitPath]:
    """Take the logarithm of exits that give probabilities, on the example and on random inputs alike."""
    marked = with_probabilities(paths, [path.find(returned, module) for path in paths.values()])
    if marked == paths:
        return paths
    returned = _call(module, rows.random(rows.num_rows, seed=0))[1]
    again = with_probabilities(paths, [path.find(returned, module) for path in paths.values()])
    return {name: marked[name] if marked[name] == again[name] else path for name, path in paths.items()}


def _notes(program: Program, chosen: Chosen, paths: Mapping[str, ExitPath]) -> tuple[str, ...]:
    notes = []
    if list(paths) != list(chosen.paths):
        notes.append(f"put the exits in the order of their depth, which is not that of the output: {', '.join(paths)}")
    found = [name for name, path in paths.items() if path.is_probability and not chosen.paths[name].is_probability]
    if found:
        notes.append(f"{', '.join(found)}: these are probabilities, and their logarithms are taken for logits")
    return (*notes, *_hard_notes(program))


def _hard_notes(program: Program) -> list[str]:
    lines = hard_decisions(program)
    if not lines:
        return []
    return [f"decides hard at {'; '.join(lines)}: a row within rounding of the threshold may fall on the other side"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every reachable module in evaluation mode, those in plain lists and dicts included; restore it after."""
    modules = list({id(each): each for each in reachable(module)}.values())
    training = [each.training for each in modules]
    try:
        for each in modules:
            if each.training:
                each.eval()
        yield
    finally:
        for each, was_training in zip(modules, training, strict=True):
            each.training = was_training


def _call(module: nn.Module, examples: Examples) -> tuple[nn.Module, Any]:
    """Call the module once; where it is a staged one that returns a single answer, call its parts."""
    try:
        with ForwardMode(home_of(module)):
            returned = examples.call(module)
    except Exception as error:  # the network's own code raises what it likes
        raise TraceError(f"the network fails on its example inputs{explain(error)}") from error
    parts = staged_parts(module) if isinstance(returned, torch.Tensor) else None
    return _call(parts, examples) if parts is not None and parts is not module else (module, returned)


def _to_onnx(network: nn.Module, examples: Examples) -> ModelProto:
    """Export, non-strict first; strict where that fails or makes the batch static."""
    failures: list[Exception] = []
    with overhearing() as overheard:
        for strict in (False, True):
            try:
                return _export(network, examples, strict)
            except Exception as error:  # torch raises what it likes, and the network's own code what it likes
                failures.append(error)
                if is_data_dependent(error):
                    break
    raise refusal(failures, overheard.line) from failures[0]


def _export(network: nn.Module, examples: Examples, strict: bool) -> ModelProto:
    batch = {0: torch.export.Dim("batch")} if examples.num_rows > 1 else None
    tensors = tuple(torch.tensor(array, device=home_of(network)) for array in examples.arrays.values())
    with torch.no_grad():
        with restored(network):
            exported = torch.export.export(
                network, tensors, dynamic_shapes=(tuple(batch for _ in tensors),), strict=strict
            )
        exported = decomposed(exported)
        written = translate(exported, list(examples.arrays))
    if written is None:
        raise StaticBatch("nothing was written")
    model: ModelProto = written.model_proto
    if batch is None:
        return model
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise StaticBatch(f"{value.name} has a static batch")
    return model
