"""Module -> one ONNX program whose outputs are all exits.

The module is called once, to see what it returns, and traced with a dynamic batch. What torch's exporters write is read
back: they may make the batch static without a word. Nothing here knows of stages.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from offramp_contract.errors import TraceError
from onnx import ModelProto
from torch import nn

from offramp_exporter.examples import ExampleInputs, Examples, read_examples
from offramp_exporter.exits import ExitNames, choose_exits, walk
from offramp_exporter.program import Program, program_of_model
from offramp_exporter.quiet import overhearing
from offramp_exporter.refusal import StaticBatch, explain, is_data_dependent, refusal
from offramp_exporter.staged import staged_parts

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
    """

    program: Program
    network: nn.Module
    examples: Examples
    paths: dict[str, str]


class ExitsOnly(nn.Module):
    """A network reduced to its exits: `forward` gives the tuple of the tensors at some paths of what it returned."""

    def __init__(self, network: nn.Module, paths: tuple[str, ...], names: tuple[str, ...] | None) -> None:
        super().__init__()
        self.network, self.paths, self.names = network, paths, names

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give the exits' logits."""
        if self.names is None:
            returned = self.network(*inputs)
        else:
            returned = self.network(**dict(zip(self.names, inputs, strict=True)))
        found = dict(walk(returned))
        return tuple(found[path] for path in self.paths)


def trace(
    module: nn.Module, example_inputs: ExampleInputs, exits: ExitNames | None = None, num_classes: int | None = None
) -> Trace:
    """Trace a module into one program of all its exits.

    Args:
        module: Its `forward` returns its exits; or it has `stages` and `exit_heads`.
        example_inputs: What it takes.
        exits: Which of the returned tensors are exits; see `offramp_exporter.exits.choose_exits`.
        num_classes: Width of an exit, if known.

    Raises:
        TraceError: Saying what stands in the way and what to do.
    """
    examples = read_examples(module, example_inputs)
    with evaluating(module):
        return _trace(module, examples, exits, num_classes)


def _trace(module: nn.Module, examples: Examples, exits: ExitNames | None, num_classes: int | None) -> Trace:
    rows = examples.with_rows(max(_TRACE_ROWS, examples.num_rows))
    module, returned = _call(module, rows)
    chosen = choose_exits(returned, rows.num_rows, exits, num_classes)
    names = tuple(examples.arrays) if examples.by_name else None
    network = ExitsOnly(module, tuple(chosen.values()), names).eval()
    model = _to_onnx(network, rows)
    outputs = [value.name for value in model.graph.output]
    program = program_of_model(model, dict(zip(chosen, outputs, strict=True)))
    return Trace(program, network, Examples(examples.arrays), chosen)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every reachable module in evaluation mode, those in plain lists and dicts included; restore it after."""
    modules = list({id(each): each for each in _reachable(module)}.values())
    training = [each.training for each in modules]
    try:
        for each in modules:
            if each.training:
                each.eval()
        yield
    finally:
        for each, was_training in zip(modules, training, strict=True):
            each.training = was_training


def _reachable(value: object, seen: set[int] | None = None) -> Iterator[nn.Module]:
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    if isinstance(value, nn.Module):
        seen.add(id(value))
        yield value
        for held in (*value.children(), *vars(value).values()):
            yield from _reachable(held, seen)
    elif isinstance(value, list | tuple | dict):
        seen.add(id(value))
        for held in value.values() if isinstance(value, dict) else value:
            yield from _reachable(held, seen)


def _call(module: nn.Module, examples: Examples) -> tuple[nn.Module, Any]:
    """Call the module once; where it is a staged one that returns a single answer, call its parts."""
    try:
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
    batch = torch.export.Dim("batch")
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    tensors = tuple(torch.tensor(array, device=device) for array in examples.arrays.values())
    with torch.no_grad():
        exported = torch.export.export(
            network, tensors, dynamic_shapes=(tuple({0: batch} for _ in tensors),), strict=strict
        )
        written = torch.onnx.export(exported, dynamo=True, verbose=False, input_names=list(examples.arrays))
    if written is None:
        raise StaticBatch("nothing was written")
    model: ModelProto = written.model_proto
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise StaticBatch(f"{value.name} has a static batch")
    return model
