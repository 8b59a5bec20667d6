"""`offramp demo`: trains, exports, serves and measures, on real digits, and shows what early exit buys."""

import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from offramp_server.settings import ServerSettings
from rich.table import Table

from offramp_cli.console import progress, stderr, stdout
from offramp_cli.digits import NAME, Recipe, digits_bundle
from offramp_cli.errors import CommandError
from offramp_cli.figure import draw_trade_off, machine
from offramp_cli.load import DigitsLoad
from offramp_cli.measure import THRESHOLDS, Asked, Measured, at_exit, bars, compute, confidence, entropy, patience
from offramp_cli.server_process import server_process

BUDGET_SHARES = (1.5, 0.5)
"""Latency budgets, as shares of the way from the first exit's latency on an idle server to full depth's."""
COMPUTE_BUDGETS = (0.3, 0.5, 0.7)


def demo(
    *,
    out: Annotated[Path, typer.Option(help="Where weights and bundle are kept for the next run.")] = Path(".demo"),
    fresh: Annotated[bool, typer.Option(help="Train, export and calibrate anew even if a bundle is there.")] = False,
    bundle_only: Annotated[bool, typer.Option(help="Make the bundle if needed, and stop there.")] = False,
    keep_serving: Annotated[bool, typer.Option(help="Go on serving after the table, until Ctrl-C.")] = False,
    figure: Annotated[
        Path | None, typer.Option(help="Also measure a sweep and draw it: an .svg, .png or .pdf.")
    ] = None,
    rate: Annotated[float, typer.Option(min=1, help="Requests per second, on average.")] = 100.0,
    images: Annotated[int, typer.Option(min=10, max=500, help="How many of the 500 test images to send.")] = 500,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 6,
    seed: Annotated[int, typer.Option(help="For weights, data split and arrivals.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to train and to serve with.")] = None,
) -> None:
    """Train a small network on handwritten digits, calibrate and serve it, and measure policies and budgets."""
    signal.signal(signal.SIGTERM, _leave)
    out.mkdir(parents=True, exist_ok=True)
    bundle = digits_bundle(out, Recipe(seed, epochs, threads), fresh)
    if bundle_only:
        return
    flags = () if threads is None else ("--threads", str(threads))
    with server_process(bundle, out / "server.log", flags) as url:
        stderr.print(f"[green]✓[/] serving {bundle} at {url}", highlight=False)
        load = DigitsLoad.of_test_images(url, NAME, num_images=images, rate=rate, seed=seed)
        measured = _measure_table(load)
        stdout.print(_table(measured))
        _explain(measured, url, load)
        if figure is not None:
            _draw(load, figure)
        if keep_serving:
            _serve_until_interrupted(url)


def _measure_table(load: DigitsLoad) -> list[Measured]:
    """Measure policies without a budget, then the deepest and a careful one under budgets that bind on this machine."""
    num_exits = len(load.exit_names)
    first, full, careful = at_exit(0, num_exits), at_exit(num_exits - 1, num_exits), confidence(0.95)
    fastest_ms, slowest_ms = load.idle_ms(first), load.idle_ms(full)
    margin_ms = ServerSettings.load().margin_ms  # what the engine keeps free of every budget
    wide_ms, tight_ms = (
        round(fastest_ms + share * (slowest_ms - fastest_ms) + margin_ms, 1) for share in BUDGET_SHARES
    )
    unlimited = [full, first, confidence(0.8), careful, entropy(0.1), patience(1), *map(compute, COMPUTE_BUDGETS)]
    limited = [full.within(wide_ms), careful.within(wide_ms), full.within(tight_ms)]
    return _all(load, [*unlimited, *limited], "measuring")


def _all(load: DigitsLoad, asked: Sequence[Asked], what: str) -> list[Measured]:
    with progress() as display:
        task = display.add_task(what, total=len(asked), note="")
        measured = []
        for one in asked:
            display.update(task, note=one.policy)
            measured.append(load.send(one))
            display.advance(task)
        display.update(task, note="")
    return measured


def _table(measured: Sequence[Measured]) -> Table:
    table = Table(title="What each way of asking costs and gets", box=None, pad_edge=False, title_justify="left")
    table.add_column("policy", no_wrap=True)
    for heading in ("budget", "accuracy", "average depth", "compute saved", "p50 ms", "p99 ms"):
        table.add_column(heading, justify="right", min_width=min(8, len(heading)))
    table.add_column("exits, %", no_wrap=True)
    table.add_column("forced", justify="right")
    for one in measured:
        table.add_row(
            one.asked.policy,
            "-" if one.asked.budget_ms is None else f"{one.asked.budget_ms:g} ms",
            f"{one.accuracy:.1%}",
            f"{one.mean_depth:.0%}",
            f"{1 - one.mean_depth:.0%}",
            f"{one.p50_ms:.1f}",
            f"{one.p99_ms:.1f}",
            bars(one.exit_counts_E),
            f"{one.forced:.0%}" if one.forced else "-",
        )
    return table


def _explain(measured: Sequence[Measured], url: str, load: DigitsLoad) -> None:
    failed = sum(one.num_failed for one in measured)
    if failed:
        raise CommandError(f"{failed} requests were not answered")
    stdout.print(
        f"\n{measured[0].num_answered} requests a row, each with one of {len(load.payloads)} test images, "
        f"{load.rate:g} a second (Poisson), on {machine()}.\n"
        "Depth is the share of the full network's FLOPs that an answer took; latency counts from when a request\n"
        "was due; a forced answer is one that its latency budget cut short. `compute ≤` asks for the best answers\n"
        "within an average depth; the bundle's calibration, on images held out from training, knows the rule.\n\n"
        f"docs     {url}/docs\nmetrics  {url}/metrics\n"
        "         (while it serves: `make serve`, or `offramp demo --keep-serving`)",
        highlight=False,
        soft_wrap=True,
    )


def _draw(load: DigitsLoad, figure: Path) -> None:
    num_exits = len(load.exit_names)
    static = _all(load, [at_exit(index, num_exits) for index in range(num_exits)], "measuring each exit")
    adaptive = _all(load, [confidence(threshold) for threshold in THRESHOLDS], "measuring thresholds")
    draw_trade_off(adaptive, static, load, figure)
    stdout.print(f"figure   {figure}", highlight=False)


def _serve_until_interrupted(url: str) -> None:
    stdout.print(f"\nserving at {url} until Ctrl-C", highlight=False)
    with suppress(KeyboardInterrupt):
        signal.pause()


def _leave(number: int, frame: FrameType | None) -> None:
    """End by way of the blocks that clean up, so that no server is left behind."""
    raise SystemExit(128 + number)
