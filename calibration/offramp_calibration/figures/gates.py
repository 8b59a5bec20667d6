"""What shutting gates costs and saves, and which gates are shut first."""

from typing import Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from offramp_calibration.evaluation import Evaluation
from offramp_calibration.figures.style import WIDTH, Theme, new_figure
from offramp_calibration.gate_results import GateRung

MAX_NAMES: Final = 16


def gates(evaluation: Evaluation, theme: Theme) -> Figure:
    """Accuracy over compute, a point per gate threshold; and the open rates of every gate at each."""
    figure, (curve, rates) = new_figure(WIDTH, 4.0, 1, 2)
    if evaluation.gates is not None:
        _curve(curve, evaluation.gates.rungs, theme)
        _open_rates(figure, rates, evaluation.gates.names, evaluation.gates.rungs, theme)
    return figure


def _curve(axis: Axes, rungs: tuple[GateRung, ...], theme: Theme) -> None:
    computes = [rung.point.compute for rung in rungs]
    accuracies = [rung.point.accuracy.value for rung in rungs]
    errors = np.abs(np.array([rung.point.accuracy.interval for rung in rungs]).T - accuracies)
    axis.errorbar(computes, accuracies, yerr=errors, fmt="o-", color=theme.early, elinewidth=1, markersize=4)
    own = next(rung.point for rung in rungs if rung.threshold is None)
    axis.plot(own.compute, own.accuracy.value, "D", color=theme.best, markersize=7, label="own thresholds", zorder=4)
    axis.set(xlabel="average share of full FLOPs", ylabel="accuracy", xlim=(0, 1.03))
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.legend(loc="lower right", frameon=False, fontsize=8.5)


def _open_rates(figure: Figure, axis: Axes, names: tuple[str, ...], rungs: tuple[GateRung, ...], theme: Theme) -> None:
    ramp = mpl.colors.LinearSegmentedColormap.from_list("open", (theme.page, theme.early))
    rate_GP = np.array([rung.open_rates for rung in rungs]).T
    drawn = axis.pcolormesh(rate_GP, cmap=ramp, vmin=0, vmax=1)
    shown = ["own" if rung.threshold is None else f"{rung.threshold:.3g}" for rung in rungs]
    some = np.unique(np.linspace(0, len(rungs) - 1, min(len(rungs), MAX_NAMES)).round().astype(int))
    axis.set_xticks(some + 0.5, [shown[index] for index in some], rotation=90, fontsize=7.5)
    every = np.unique(np.linspace(0, len(names) - 1, min(len(names), MAX_NAMES)).round().astype(int))
    axis.set_yticks(every + 0.5, [names[index][:18] for index in every], fontsize=7.5)
    axis.invert_yaxis()
    axis.grid(visible=False)
    axis.set(xlabel="gate threshold")
    bar = figure.colorbar(drawn, ax=axis, format=PercentFormatter(1, decimals=0))
    bar.set_label("samples it is open for", fontsize=8.5)
