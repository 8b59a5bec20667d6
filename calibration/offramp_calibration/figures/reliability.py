"""How often each exit is right over how sure it is, before and after its temperature."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from offramp_calibration.evaluation import Evaluation
from offramp_calibration.exit_quality import ExitResult
from offramp_calibration.figures.style import MAX_PANELS, WIDTH, Theme, grid, new_figure
from offramp_calibration.reliability import Bin


def reliability(evaluation: Evaluation, theme: Theme) -> Figure:
    """One panel per exit: how often right over how sure, before and after its temperature."""
    shown = _spread(evaluation.exits, MAX_PANELS)
    rows, columns = grid(len(shown))
    figure, axes = new_figure(
        WIDTH if columns > 2 else 2.4 + 2.4 * (columns - 1), 0.9 + 1.9 * rows, rows, columns, sharex=True, sharey=True
    )
    for axis, exit_ in zip(axes, shown, strict=False):
        _reliability_panel(axis, exit_, theme)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    low = min(bin_.confidence for exit_ in shown for bin_ in (*exit_.uncalibrated.bins, *exit_.calibrated.bins))
    low = math.floor(10 * low) / 10
    axes[0].set(xlim=(low, 1.02), ylim=(low, 1.02))
    for side in (axes[0].xaxis, axes[0].yaxis):
        side.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.supxlabel("confidence: how often the exit says it is right", fontsize=9.5)
    figure.supylabel("how often it is", fontsize=9.5)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=8.5)
    return figure


def _reliability_panel(axis: Axes, exit_: ExitResult, theme: Theme) -> None:
    before, after = exit_.uncalibrated, exit_.calibrated
    axis.plot((0, 1), (0, 1), color=theme.still, linewidth=1, linestyle=":")
    trained = {"color": theme.best, "markerfacecolor": theme.page, "markersize": 3.5, "linewidth": 1}
    calibrated = {"color": theme.early, "markersize": 4, "linewidth": 1.4}
    only_one = exit_.temperature == 1
    _bins(axis, before.bins, trained | {"label": "as trained (temperature 1)"}, with_intervals=only_one)
    if not only_one:
        _bins(axis, after.bins, calibrated | {"label": "at the calibrated temperature"}, with_intervals=True)
    change = f"{100 * before.ece:.1f}" if only_one else f"{100 * before.ece:.1f} → {100 * after.ece:.1f}"
    axis.set_title(f"{exit_.name}: ECE {change} %", fontsize=8.5)


def _bins(axis: Axes, bins: Sequence[Bin], look: dict[str, Any], *, with_intervals: bool) -> None:
    intervals = [
        [bin_.accuracy - bin_.interval[0] for bin_ in bins],
        [bin_.interval[1] - bin_.accuracy for bin_ in bins],
    ]
    axis.errorbar(
        [bin_.confidence for bin_ in bins],
        [bin_.accuracy for bin_ in bins],
        yerr=intervals if with_intervals else None,
        fmt="o-",
        elinewidth=0.8,
        **look,
    )


def _spread(exits: Sequence[ExitResult], most: int) -> list[ExitResult]:
    if len(exits) <= most:
        return list(exits)
    return [exits[round(index * (len(exits) - 1) / (most - 1))] for index in range(most)]
