"""Draws the trade-off between accuracy and compute that a set of measured policies shows."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp_cli.load import DigitsLoad
    from offramp_cli.measure import Measured

EARLY, STATIC = "#0b6e4f", "#8a8d91"


def draw_trade_off(
    adaptive: "Sequence[Measured]", static: "Sequence[Measured]", load: "DigitsLoad", path: Path
) -> None:
    """Write an SVG (or what the suffix says): accuracy over average compute and over median latency.

    Args:
        adaptive: One threshold each, from the cheapest to the dearest.
        static: Every request leaving at the same exit, from the first exit to the last.
        load: The load they were measured under; stands under the figure.
        path: Where to write it.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(
        {"svg.hashsalt": "offramp", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure, (compute, latency) = plt.subplots(1, 2, figsize=(8.6, 3.7), sharey=True)
        for axis, value in ((compute, "mean_depth"), (latency, "p50_ms")):
            _curve(axis, static, value, {"color": STATIC, "marker": "s", "label": "the same exit for everyone"})
            _curve(axis, adaptive, value, {"color": EARLY, "marker": "o", "label": "as deep as each image needs"})
            axis.grid(alpha=0.25, linewidth=0.6)
        _label_points(compute, adaptive, static)
        compute.set(xlabel="average compute, share of full depth", ylabel="accuracy on test images")
        compute.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        compute.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        compute.set_xlim(0, 1.14)
        compute.set_ylim(min(point.accuracy for point in static) - 0.01, 1.005)
        latency.set(xlabel="median latency over HTTP, ms")
        latency.set_xlim(left=0)
        compute.legend(frameon=False, loc="lower right")
        figure.text(0.01, 0.012, _caption(static, load), fontsize=7, color="#55585c")
        figure.tight_layout(rect=(0, 0.04, 1, 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without a date the same numbers give the same file.
        metadata = {"Date": None, "Description": _caption(static, load)} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata, dpi=150)
        plt.close(figure)


def _curve(axis: Any, points: "Sequence[Measured]", value: str, look: dict[str, str]) -> None:
    x = [getattr(point, value) for point in points]
    axis.plot(x, [point.accuracy for point in points], markersize=4.5, **look)


def _label_points(axis: Any, adaptive: "Sequence[Measured]", static: "Sequence[Measured]") -> None:
    looks = ((adaptive, EARLY, (-3, 6), "right"), (static, STATIC, (7, -4), "left"))
    for points, colour, offset, side in looks:
        for point in points:
            place = (point.mean_depth, point.accuracy)
            axis.annotate(
                point.asked.short, place, offset, textcoords="offset points", color=colour, ha=side, fontsize=7
            )


def _caption(static: "Sequence[Measured]", load: "DigitsLoad") -> str:
    return (
        f"a point: {static[0].num_answered} requests with one handwritten digit each, {load.rate:g}/s (Poisson), seed "
        f"{load.scenario.seed}; {machine()}; drawn by `offramp demo --figure`"
    )


def machine() -> str:
    """Name the processor and the number of cores this process may use."""
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
