"""Prints what the exporter understood of a network, before anything is written."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from offramp_cli.console import stdout

if TYPE_CHECKING:
    from offramp_contract.manifest import Tensor
    from offramp_exporter.explain import Explanation

MAX_NAMED = 3
"""Carries of a boundary that are named one by one; of more, the rest is counted."""


def print_explanation(explained: "Explanation") -> None:
    """Print an explanation: facts, a table of exits, then what a person should know."""
    smallest, largest = explained.batches.smallest, explained.batches.largest
    num_exits = len(explained.exits)
    facts = {
        "network": explained.source,
        "reads": ", ".join(map(_spell, explained.inputs)),
        "program": f"{explained.num_nodes} nodes, {explained.full_flops:,} FLOPs a row, {explained.precision}",
        "exits": f"{num_exits}, one stage each" if num_exits > 1 else "1, so no row can leave early",
        "batch": f"{smallest} or more" if largest is None else f"{smallest} to {largest}",
        "default policy": explained.default_policy.model_dump_json(exclude_none=True),
    }
    if num_exits > 1 and explained.gates:
        facts["exits"] = str(num_exits)
    if explained.gates:
        share = explained.trunk_flops / max(explained.full_flops, 1)
        facts["gates"] = f"{len(explained.gates)}; with all of them shut {share:.1%} of the FLOPs are left, the trunk"
    if explained.shared_bytes:
        facts["stored once"] = f"{explained.shared_bytes:,} bytes of weights that several stages read"
    for name, value in facts.items():
        _line(f"[bold]{name:<15}[/]{escape(value)}")
    stdout.print()
    stdout.print(_table(explained))
    if explained.gates:
        stdout.print()
        stdout.print(_gates(explained))
    native = [f"{exit_.name}  {exit_.native}" for exit_ in explained.exits if exit_.native]
    _paragraph("rules of its own (policy native), by which each row leaves", native)
    _paragraph("branches on a tensor's value, and what was answered", explained.answers)
    _paragraph("to know", explained.notes)
    _line("\nnothing was written")


def _table(explained: "Explanation") -> Table:
    table = Table("exit", "where", box=None, pad_edge=False)
    for column in ("classes", "FLOPs", "share", "depth"):
        table.add_column(column, justify="right")
    table.add_column("carried on, a row")
    table.add_column("bytes", justify="right")
    for exit_ in explained.exits:
        cells = (
            *(exit_.name, exit_.path, str(exit_.num_classes), f"{exit_.flops:,}", f"{exit_.share:.1%}"),
            *(f"{exit_.depth:.1%}", _few(exit_.carries), f"{exit_.carry_bytes:,}" if exit_.carries else ""),
        )
        table.add_row(*map(escape, cells))
    return table


def _gates(explained: "Explanation") -> Table:
    table = Table("gate", "score", box=None, pad_edge=False)
    table.add_column("threshold", justify="right")
    table.add_column("bodies")
    for column in ("FLOPs", "share"):
        table.add_column(column, justify="right")
    table.add_column("merges")
    for gate in explained.gates:
        score = f"priority {gate.priority:g}" if gate.stage is None else f"stage_{gate.stage}"
        bodies = ", ".join(f"stage_{index}" for index in gate.bodies)
        more = f" and {len(gate.merges) - MAX_NAMED} more" if len(gate.merges) > MAX_NAMED else ""
        cells = (
            *(gate.name, score, f"{gate.threshold:g}", bodies, f"{gate.flops:,}", f"{gate.share:.1%}"),
            "; ".join(gate.merges[:MAX_NAMED]) + more,
        )
        table.add_row(*map(escape, cells))
    return table


def _paragraph(title: str, lines: Sequence[str]) -> None:
    if lines:
        _line(f"\n[bold]{title}[/]")
        for line in lines:
            _line(f"  {escape(line)}")


def _few(tensors: "Sequence[Tensor]") -> str:
    named = ", ".join(map(_spell, tensors[:MAX_NAMED]))
    return named if len(tensors) <= MAX_NAMED else f"{named} and {len(tensors) - MAX_NAMED} more"


def _spell(tensor: "Tensor") -> str:
    kind = "" if tensor.dtype == "float32" else f" {tensor.dtype}"
    return f"{tensor.name} {'x'.join(map(str, tensor.shape)) or 'scalar'}{kind}"


def _line(text: str) -> None:
    stdout.print(text, soft_wrap=True, highlight=False)
