"""Draws what was measured under load: medians of the passes, with their range."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from offramp_calibration.figures.style import LIGHT, new_figure, styled

WIDTH, HEIGHT = 9.6, 4.4
FAMILY: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1f2328")
"""Okabe and Ito's palette, which all kinds of colour vision tell apart."""
MARKERS: Final = "os^Dv<P"


@dataclass(frozen=True, slots=True)
class Curve:
    """What one configuration came to at each load.

    Attributes:
        name, kind: Of the configuration.
        runs: Its points at each load, a pass each.
    """

    name: str
    kind: str
    runs: Mapping[float, Sequence[Mapping[str, Any]]]

    def spread(self, value: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Give median, least and greatest of a number at each load."""
        at = np.array([[float(run[value]) for run in runs] for runs in self.runs.values()])
        return np.median(at, axis=1), at.min(axis=1), at.max(axis=1)


def curves_of(document: Mapping[str, Any]) -> list[Curve]:
    """Sort a series' points by configuration and load."""
    points = document["points"]
    rhos = sorted({point["rho"] for point in points})
    return [
        Curve(
            one["name"],
            one["kind"],
            {rho: [p for p in points if p["configuration"] == one["name"] and p["rho"] == rho] for rho in rhos},
        )
        for one in document["configurations"]
    ]


def draw(document: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Write the figures of a series; gives their files by name."""
    curves = curves_of(document)
    full, early = document["full"], document["early"]
    figures: dict[str, Callable[[], Figure]] = {
        "baselines": lambda: _lines([c for c in curves if c.kind != "ablation"], full, early),
        "ablations": lambda: _lines([c for c in curves if c.kind == "ablation" or c.name == early], full, early),
    }
    files = {}
    for name, make in figures.items():
        with styled(LIGHT), mpl.rc_context({"svg.hashsalt": "offramp"}):
            files[name] = folder / f"{document['model']}-{name}.svg"
            make().savefig(files[name], metadata={"Date": None})
    return files


def _lines(curves: Sequence[Curve], full: str, early: str) -> Figure:
    figure, (goodput, attainment) = new_figure(WIDTH, HEIGHT, 1, 2)
    looks = dict(zip((c.name for c in curves), _looks(curves, full, early), strict=True))
    for curve in curves:
        _line(goodput, curve, "correct_goodput", looks[curve.name])
        _line(attainment, curve, "attainment", looks[curve.name])
    goodput.set(title="answers on time and right, per second", xlabel="load, share of full depth's capacity")
    goodput.set_ylim(bottom=0)
    attainment.set(title="arrivals answered on time", xlabel="load, share of full depth's capacity", ylim=(0, 1.02))
    attainment.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    handles, labels = goodput.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return figure


def _looks(curves: Sequence[Curve], full: str, early: str) -> list[dict[str, Any]]:
    """Give each line its look: static ones grey, ours thick."""
    looks, colours, markers = [], itertools.cycle(FAMILY[1:]), itertools.cycle(MARKERS[1:])
    statics = [curve.name for curve in curves if curve.kind == "static" and curve.name != full]
    for curve in curves:
        if curve.name == early:
            look = {"color": FAMILY[0], "linewidth": 2.6, "marker": "o", "zorder": 5}
        elif curve.name == full:
            look = {"color": LIGHT.ink, "linewidth": 1.8, "marker": "s"}
        elif curve.name in statics:
            shade = 0.55 + 0.3 * statics.index(curve.name) / max(len(statics), 1)
            look = {"color": str(shade), "linewidth": 1.2, "linestyle": "--", "marker": next(markers)}
        else:
            look = {"color": next(colours), "linewidth": 1.4, "marker": next(markers)}
        looks.append(look)
    return looks


def _line(axis: Axes, curve: Curve, value: str, look: Mapping[str, Any]) -> None:
    middle, least, most = curve.spread(value)
    axis.errorbar(
        list(curve.runs), middle, (middle - least, most - middle), label=curve.name, markersize=4.5, capsize=2, **look
    )
