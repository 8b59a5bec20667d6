"""`offramp models`: what can be chosen for a training: networks, exits, gates, methods and data sets."""

import inspect
from typing import TYPE_CHECKING

from rich.table import Table

from offramp_cli.console import stdout

if TYPE_CHECKING:
    from offramp_models.networks import NetworkPlan


def models() -> None:
    """List the networks that can be trained here, what their exits and gates can be, the methods and the data sets."""
    from offramp_models import DATA_SETS
    from offramp_models.exits import EXITS
    from offramp_models.gates import GATES, RELAXATIONS
    from offramp_models.networks import NETWORKS, plan_network
    from offramp_models.training import METHODS

    stdout.print(_networks([plan_network(name) for name in sorted(NETWORKS)]))
    described = (("exits", EXITS), ("gates", GATES), ("gate relaxation", RELAXATIONS), ("method", METHODS))
    for heading, things in described:
        table = Table(heading, "what it is", box=None, pad_edge=False)
        for name, thing in sorted(things.items()):
            table.add_row(name, _first_line(thing.__doc__))
        stdout.print("", table)
    table = Table("data set", "what it is", box=None, pad_edge=False)
    for name, load in sorted(DATA_SETS.items()):
        table.add_row(name, _first_line(getattr(inspect.getmodule(load), "__doc__", "")))
    stdout.print("", table)
    for name in sorted(NETWORKS):
        plan = plan_network(name)
        gates = "" if plan.gates is None else f" --gates {plan.gates}"
        stdout.print(f"\n[bold]{name}[/]{gates} --knob", _knobs(plan), highlight=False, soft_wrap=True)


def _networks(plans: "list[NetworkPlan]") -> Table:
    """Describe networks as they are built unless told otherwise; a data set's shape and classes come in their place."""
    import torch

    table = Table("network", "exits", "parameters", "input", "what it is", box=None, pad_edge=False)
    for plan in plans:
        with torch.device("meta"), torch.inference_mode():  # shapes alone, nothing is computed
            network = plan.build().eval()
            num_exits = len(network(torch.zeros(1, *plan.input_shape)))
        num_parameters = sum(parameter.numel() for parameter in network.parameters())
        shape = "x".join(map(str, plan.input_shape))
        exits, summary = f"{num_exits} {plan.exits}", _first_line(type(network).__doc__)
        table.add_row(plan.network, exits, f"{num_parameters:,}", shape, summary)
    return table


def _knobs(plan: "NetworkPlan") -> str:
    return "  ".join(
        f"{name}={value if isinstance(value, int) else ','.join(map(str, value))}" for name, value in plan.knobs.items()
    )


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
