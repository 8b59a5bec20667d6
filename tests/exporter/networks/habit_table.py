"""The habits, each with the network that shows it, and what its exits are when it is simply called."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import carrying_networks as carrying
import returning_networks as returning
import speaking_networks as speaking
import torch
from carrying_networks import WIDTH
from torch import Tensor, nn

Rows = dict[str, Tensor]
"""Inputs by name; one without a name goes in alone."""


def numbers(*shape: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda rows: {"": torch.randn(rows, *shape)}


def plain(rows: int) -> dict[str, Tensor]:
    return {"": torch.randn(rows, WIDTH)}


def pair(rows: int) -> dict[str, Tensor]:
    return {"left": torch.randn(rows, WIDTH), "right": torch.randn(rows, WIDTH)}


def tokens(rows: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 9, (rows, 5))
    return {"ids": ids, "mask": (torch.arange(5) < torch.randint(1, 6, (rows, 1))).long()}


@dataclass(frozen=True)
class Habit:
    """A network, and what its exits are when it is simply called.

    Attributes:
        make: Makes it.
        rows: Makes so many rows of its inputs.
        exits: What the user says of the exits, if anything.
        order: Numbers that the exits are named by, in order of depth.
        eager: Picks the exits of what it returned.
        call: Calls it, where that takes more than its inputs.
        constants: What it takes beside tensors.
        batches: Least and largest batch that it takes.
    """

    make: Callable[[], nn.Module]
    rows: Callable[[int], Rows] = plain
    exits: Any = None
    order: tuple[int, ...] = (0, 1, 2)
    eager: Callable[[Any], Any] = lambda returned: returned
    call: Callable[..., Any] = lambda network, *inputs, **constants: network(*inputs, **constants)
    constants: Mapping[str, Any] = field(default_factory=dict)
    batches: tuple[int, int | None] = (1, None)

    def example(self) -> Any:
        """Make two rows to export it with."""
        rows = self.rows(2)
        if self.constants:
            return (*rows.values(), *self.constants.values())
        return rows.get("", rows)

    def simply_called(self, network: nn.Module, rows: Rows) -> list[Tensor]:
        """Give every exit's scores, of as many rows at a time as it takes."""
        network.eval()
        parts = zip(*(tensor.split(self.batches[1] or len(tensor)) for tensor in rows.values()), strict=True)
        with torch.no_grad():
            answers = [self.eager(self.call(network, *part, **self.constants)) for part in parts]
        return [torch.cat(exits) for exits in zip(*answers, strict=True)]


def _after_the_call(network: Any, x: Tensor) -> list[Tensor]:
    network(x)
    return [layer.scores for layer in network.layers]


def _all_in_eval(network: Any, x: Tensor) -> Any:
    for part in network.hidden:
        part.eval()
    return network(x)


TWO = (0, 1)
HABITS = {
    "lists of scales": Habit(carrying.ListsOfScales, numbers(1, 6, 6)),
    "nested lists with long range": Habit(carrying.NestedListsWithLongRange),
    "an ensemble of all logits so far": Habit(carrying.EnsembleOfLogits),
    "an ensemble of all log-probabilities so far": Habit(carrying.EnsembleOfLogProbabilities),
    "the state of an LSTM": Habit(carrying.RecurrentState, numbers(4, 3), order=TWO),
    "an LSTM of two layers and two directions": Habit(carrying.BothWays, numbers(4, 3), order=TWO),
    "an attention map used again": Habit(carrying.AttentionMaps, numbers(5, 4), order=TWO),
    "two inputs in two streams": Habit(carrying.TwoStreams, pair, order=TWO),
    "the input used again late": Habit(carrying.InputAgain),
    "counters": Habit(carrying.Counters),
    "heads after all blocks": Habit(returning.HeadsLast),
    "layers that store their outputs": Habit(returning.LayersKeepTheirOutputs),
    "exits in attributes that forward sets": Habit(
        returning.OnlyTheFinalIsReturned,
        exits=["self.layers[0].scores", "self.layers[1].scores", "out"],
        call=_after_the_call,
    ),
    "forward hooks": Habit(returning.Hooks),
    "an exception that carries the exits": Habit(returning.StopsByAnException, order=TWO),
    "exits stacked on axis 0": Habit(returning.StackedInFront, eager=list),
    "exits stacked on axis 1": Habit(returning.StackedBehindTheBatch, eager=lambda out: list(out.unbind(1))),
    "exits stacked and turned, by name": Habit(
        returning.StackedAndTurned, exits=["stack(out.logits, dim=1)"], eager=lambda out: list(out["logits"].unbind(1))
    ),
    "the final exit first": Habit(returning.FinalFirst, order=(1, 2, 0), eager=lambda out: [out[1], out[2], out[0]]),
    "the final exit first, in a word": Habit(
        returning.FinalFirst, exits=["final-first"], order=(1, 2, 0), eager=lambda out: [out[1], out[2], out[0]]
    ),
    "the deepest exit first": Habit(returning.DeepestFirst, order=(2, 1, 0), eager=lambda out: out[::-1]),
    "one task of several": Habit(returning.Tasks, exits=["out[:][1]"], eager=lambda out: [exit_[1] for exit_ in out]),
    "a dict": Habit(returning.Dict, eager=lambda out: list(out.values())),
    "features, gates and numbers beside the logits": Habit(
        returning.MuchBeside, exits=["out.logits[:]"], eager=lambda out: out.logits
    ),
    "probabilities beside the logits": Habit(
        returning.ProbabilitiesBeside, eager=lambda out: [exit_.logits for exit_ in out]
    ),
    "probabilities": Habit(returning.Probabilities, eager=lambda out: [exit_.log() for exit_ in out]),
    "log-probabilities": Habit(returning.LogProbabilities),
    "exits of different width": Habit(returning.Widths, exits=["out[0]", "out[1]", "out[2]"]),
    ".data and Variable": Habit(speaking.DataAndVariables),
    "moves to an accelerator": Habit(speaking.MovesToAnAccelerator, call=lambda network, x: network.exits(x + 1)),
    "a forward of the instance": Habit(speaking.OwnForward),
    "parameters made anew": Habit(speaking.MadeAnew, order=TWO),
    "tensors and modules that are not registered": Habit(speaking.NotRegistered, order=TWO, call=_all_in_eval),
    "a hard threshold": Habit(speaking.HardThreshold, order=TWO),
    "a hard top-k": Habit(speaking.HardTopK, order=TWO),
    "a gate that samples in training": Habit(speaking.SamplesInTraining, order=TWO),
    "a block that a mask blends in": Habit(speaking.MaskBlend, order=TWO),
    "ids and mask": Habit(speaking.IdsAndMask, tokens, order=TWO),
    "a number and a word beside the tensor": Habit(
        speaking.ScalarBeside, constants={"temperature": 2.0, "mode": "all"}
    ),
    "a batch of two at least": Habit(speaking.NeedsTwoRows, batches=(2, None)),
    "int() of sizes": Habit(speaking.IntOfTheBatch),
    "one row at a time": Habit(speaking.OneRowOnly, batches=(1, 1)),
}
