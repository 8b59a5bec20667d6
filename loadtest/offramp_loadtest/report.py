"""A summary as a person reads it on a terminal."""

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from offramp_loadtest.metrics import ServerSide
from offramp_loadtest.summary import Summary

BAR_WIDTH = 30
MAX_SAID = 100


def render(summary: Summary) -> RenderableType:
    """Lay a summary out: what came of the requests, percentiles, and bars for the exits."""
    parts: list[RenderableType] = [_outcomes(summary), _percentiles(summary)]
    parts += [_bars(title, counts) for title, counts in (("exit", summary.exits), ("gear", summary.gears)) if counts]
    if summary.server is not None and summary.server.stages:
        parts.append(_batches(summary.server))
    parts += [Text(f"note: {note}", style="yellow") for note in summary.notes]
    return Group(*parts)


def _outcomes(summary: Summary) -> Table:
    table = Table.grid(padding=(0, 2))
    counts = ", ".join(f"{count} {outcome}" for outcome, count in summary.outcomes.items() if count)
    table.add_row("requests", f"{summary.arrivals} due in {summary.seconds:.1f} s: {counts}")
    table.add_row("rate", f"{summary.offered_rate:.1f}/s offered, {summary.answered_rate:.1f}/s answered")
    if summary.slo_ms is not None:
        table.add_row("on time", f"{summary.attainment or 0:.1%} of all {summary.asked} within {summary.slo_ms:g} ms")
        table.add_row("goodput", f"{summary.goodput or 0:.1f}/s on time")
    if summary.correct_goodput is not None:
        table.add_row("correct goodput", f"{summary.correct_goodput:.1f}/s on time and right")
    if summary.accuracy is not None:
        table.add_row("accuracy", f"{summary.accuracy:.1%} of the answered")
    if summary.mean_depth is not None:
        saved = 1 - summary.mean_depth
        table.add_row("average depth", f"{summary.mean_depth:.3f} ({saved:.0%} of the compute saved)")
    if summary.forced is not None:
        table.add_row("forced exits", f"{summary.forced:.1%} of the answers")
    if summary.capacity is not None:
        load = summary.offered_rate / summary.capacity
        table.add_row("load", f"{load:.2f} of the {summary.capacity:.1f}/s that full depth can do")
    for said, count in summary.failures.items():
        table.add_row("said instead", f"{count} × {said[:MAX_SAID]}")
    return table


def _percentiles(summary: Summary) -> Table:
    rows = {
        "latency, from due": summary.latency_ms,
        "waited in the server": summary.queue_ms,
        "stages ran": summary.compute_ms,
        "client behind": summary.client_lag_ms,
        "no connection free": summary.connection_wait_ms,
    }
    names = next((list(row) for row in rows.values() if row), [])
    table = Table("milliseconds", *names)
    for title, row in rows.items():
        if row:
            table.add_row(title, *(f"{row[name]:.2f}" for name in names))
    return table


def _batches(server: ServerSide) -> Table:
    table = Table("stage", "dispatches", "mean rows")
    for name, stage in server.stages.items():
        table.add_row(name, str(stage.num_dispatches), f"{stage.mean_rows:.2f}")
    return table


def _bars(title: str, counts: Mapping[str, int]) -> Table:
    total, most = sum(counts.values()), max(counts.values())
    table = Table(title, "share", "")
    for name, count in counts.items():
        table.add_row(name, f"{count / total:.1%}", "█" * round(BAR_WIDTH * count / most))
    return table
