"""Draws a load test as SVG that takes the page's colours, light or dark. The same run gives the same drawing."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from offramp_loadtest import timeline as along
from offramp_loadtest.run import LoadTest
from offramp_loadtest.timeline import Timeline

WIDTH: Final = 8.0
# Matplotlib draws in these; the page's style sheet says what they are.
PAGE_COLOURS: Final = {
    "#010101": "--ink",
    "#020202": "--line",
    "#030303": "--right",
    "#040404": "--wrong",
    "#050505": "--late",
    "#060606": "--refused",
    "#070707": "--bad",
}
INK, LINE, RIGHT, WRONG, LATE, REFUSED, BAD = PAGE_COLOURS
COLOUR_OF: Final = {
    along.RIGHT: RIGHT,
    along.ON_TIME: RIGHT,
    along.WRONG: WRONG,
    along.LATE: LATE,
    along.REJECTED: REFUSED,
    along.DEADLINE: REFUSED,
    along.FAILED: BAD,
}
SHALLOW_TO_DEEP: Final = ("#bfdff0", "#56a3cf", "#0b5a8c")


def draw(test: LoadTest, series: Timeline) -> dict[str, str]:
    """Draw every figure that the run has something to show in: SVG by name."""
    answered = any(record.answer is not None for record in test.records)
    server = test.summary.server
    figures: dict[str, tuple[Callable[[LoadTest, Timeline], Figure], bool]] = {
        "became": (became, bool(series.became)),
        "latency-over-time": (latency_over_time, answered),
        "latency": (latency, answered),
        "exits": (exits, bool(series.exits)),
        "batches": (batches, server is not None and bool(server.stages)),
    }
    drawn = {}
    for name, (figure_of, is_wanted) in figures.items():
        if is_wanted:
            with _styled(name):
                drawn[name] = _svg(figure_of(test, series))
    return drawn


def became(test: LoadTest, series: Timeline) -> Figure:
    """What became of the requests, stacked, per second."""
    figure, (axis,) = _new(3.4)
    names = list(series.became)
    axis.stackplot(
        *_stepped(series, list(series.became.values())), colors=[COLOUR_OF[name] for name in names], labels=names
    )
    axis.set_ylabel("requests per second")
    axis.set_ylim(bottom=0)
    _along_time(figure, axis, test)
    return figure


def latency_over_time(test: LoadTest, series: Timeline) -> Figure:
    """Percentiles of the latency along the run."""
    figure, (axis,) = _new(3.0)
    for (name, values), width in zip(series.latency_ms.items(), (2.2, 1.5, 0.9), strict=True):
        axis.plot(series.at_s, values, color=RIGHT, linewidth=width, label=name)
    _objective(axis, test)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_ylabel("milliseconds since due")
    _along_time(figure, axis, test)
    return figure


def latency(test: LoadTest, series: Timeline) -> Figure:
    """The whole distribution of the latency, its tail stretched, with waiting and computing apart."""
    figure, (axis,) = _new(3.2)
    answers = [record.answer for record in test.records if record.answer is not None and record.intent == "ask"]
    rows: dict[str, tuple[Sequence[float | None], dict[str, Any]]] = {
        "latency, since due": (
            [r.latency_ms for r in test.records if r.answer is not None and r.intent == "ask"],
            {"color": RIGHT, "linewidth": 2.2},
        ),
        "waited in the server": ([answer.queue_ms for answer in answers], {"color": LATE, "linewidth": 1.3}),
        "stages ran": ([answer.compute_ms for answer in answers], {"color": REFUSED, "linewidth": 1.3}),
    }
    longest = 1
    for label, (values, look) in rows.items():
        known = np.sort([value for value in values if value is not None])
        if len(known):
            above = 1 - (np.arange(len(known)) + 0.5) / len(known)
            axis.plot(-np.log10(above), np.maximum(known, 1e-3), label=label, **look)
            longest = max(longest, len(known))
    _objective(axis, test)
    marks = [(0.5, "50 %"), (0.9, "90 %"), (0.95, "95 %"), (0.99, "99 %"), (0.999, "99.9 %"), (0.9999, "99.99 %")]
    marks = [(share, text) for share, text in marks if 1 - share >= 0.5 / longest]
    axis.set_xticks([-np.log10(1 - share) for share, _ in marks], [text for _, text in marks])
    axis.set_xlim(left=0)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel("share of the answers that took at most so long")
    axis.set_ylabel("milliseconds")
    figure.legend(loc="outside upper left", ncols=4, frameon=False)
    return figure


def exits(test: LoadTest, series: Timeline) -> Figure:
    """Where answers came from along the run, the forced share, and the gear."""
    below = [
        (label, values, share)
        for label, values, share in (("forced", series.forced, True), ("gear", series.gear, False))
        if values is not None
    ]
    figure, axes = _new(2.8 + 1.1 * len(below), heights=[2.4, *[1] * len(below)])
    names = list(series.exits)
    ramp = mpl.colors.LinearSegmentedColormap.from_list("depth", SHALLOW_TO_DEEP)
    colours = [mpl.colors.to_hex(ramp(index / max(len(names) - 1, 1))) for index in range(len(names))]
    axes[0].stackplot(*_stepped(series, list(series.exits.values())), colors=colours, labels=names)
    axes[0].set_ylim(0, 1)
    axes[0].set_ylabel("answers")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axis, (label, values, is_share) in zip(axes[1:], below, strict=True):
        axis.plot(series.at_s, values, color=BAD if is_share else RIGHT, linewidth=1.8)
        axis.set_ylabel(label)
        most = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
        axis.set_ylim(0, max(most * 1.15, 0.05 if is_share else 1.0))
        axis.yaxis.set_major_locator(MaxNLocator(3, integer=not is_share))
        if is_share:
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _along_time(figure, axes[-1], test, handles=axes[0])
    return figure


def batches(test: LoadTest, series: Timeline) -> Figure:
    """How many rows ran together, stage by stage: dispatches by size, and the mean."""
    server = test.summary.server
    stages = {} if server is None else server.stages
    sizes = sorted({float(size) for stage in stages.values() for size in stage.at_most})
    figure, (axis,) = _new(0.9 + 0.34 * len(stages))
    shades = mpl.colors.LinearSegmentedColormap.from_list("size", SHALLOW_TO_DEEP)
    for place, stage in enumerate(stages.values()):
        left = 0.0
        for index, size in enumerate(sizes):
            share = stage.at_most.get(f"{size:g}", 0) / stage.num_dispatches
            label = f"{'1' if size == 1 else f'up to {size:g}'}" if place == 0 else None
            colour = mpl.colors.to_hex(shades(index / max(len(sizes) - 1, 1)))
            axis.barh(place, share, left=left, color=colour, label=label, height=0.7)
            left += share
        axis.annotate(f" {stage.mean_rows:.2f} on average", (1.005, place), va="center", fontsize=8.5)
    axis.set_yticks(range(len(stages)), list(stages))
    axis.invert_yaxis()
    axis.set_xlim(0, 1.22)
    axis.set_xticks(np.linspace(0, 1, 5))
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_xlabel("share of the dispatches")
    figure.legend(loc="outside upper left", ncols=8, frameon=False)
    return figure


def _new(height: float, heights: Sequence[float] = (1,)) -> tuple[Figure, list[Axes]]:
    # Not pyplot's: it keeps what it makes, and asks for a display.
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=len(heights) > 1, squeeze=False, height_ratios=heights)
    return figure, list(axes.flat)


def _stepped(series: Timeline, values: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Give edges and values twice, so that a stack has steps and shows the first and the last stretch whole."""
    edges = np.append(series.at_s - series.bin_s / 2, series.at_s[-1] + series.bin_s / 2)
    return np.repeat(edges, 2)[1:-1], [np.repeat(value, 2) for value in values]


def _objective(axis: Axes, test: LoadTest) -> None:
    if test.summary.slo_ms is not None:
        label = f"on time: {test.summary.slo_ms:g} ms"
        axis.axhline(test.summary.slo_ms, color=BAD, linewidth=1.1, linestyle=(0, (4, 3)), label=label)


def _along_time(figure: Figure, axis: Axes, test: LoadTest, handles: Axes | None = None) -> None:
    axis.set_xlim(0, test.planned_s)
    axis.set_xlabel("seconds since the start, when requests were due")
    figure.legend(*(handles or axis).get_legend_handles_labels(), loc="outside upper left", ncols=8, frameon=False)


@contextmanager
def _styled(name: str) -> Iterator[None]:
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK)
    line = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), LINE)
    shape: dict[str, Any] = {
        "svg.hashsalt": name,
        "svg.fonttype": "path",
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "legend.fontsize": 8.5,
        "legend.handlelength": 1.2,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.6,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
    }
    with mpl.rc_context(ink | line | shape):
        yield


def _svg(figure: Figure) -> str:
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    drawn = content.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    drawn = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", drawn, count=1)
    drawn = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", drawn, count=1)
    return re.sub("|".join(PAGE_COLOURS), lambda found: f"var({PAGE_COLOURS[found.group()]})", drawn)
