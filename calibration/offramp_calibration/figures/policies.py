"""Policies against each other: one small panel each, all others faint behind it."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from offramp_calibration.evaluate import ANY_POLICY, LABEL_ORACLE, SAME_EXIT
from offramp_calibration.evaluation import CostView, Evaluation
from offramp_calibration.figures.style import MAX_PANELS, WIDTH, Theme, grid, new_figure
from offramp_calibration.measured import CurveSummary


def policies(evaluation: Evaluation, theme: Theme) -> Figure:
    """One small panel per policy, all others faint behind it."""
    families = families_of(evaluation.compute)[:MAX_PANELS]
    rows, columns = grid(len(families))
    figure, axes = new_figure(WIDTH, 1.0 + 1.55 * rows, rows, columns, sharex=True, sharey=True)
    best = next(curve for curve in evaluation.compute.curves if curve.name == ANY_POLICY)
    for axis, family in zip(axes, families, strict=False):
        for other in families:
            _steps(axis, other, theme.faint, 1.0)
        _steps(axis, family, theme.early, 2.0)
        axis.set_title(family.name.replace("-", " "), fontsize=8.5)
    for axis in axes[len(families) :]:
        axis.set_visible(False)
    # The foot of the curves is steep and all alike: what tells policies apart is near full accuracy.
    top = max(evaluation.full.accuracy.value, best.accuracies[-1])
    low = max(min(family.accuracies[0] for family in families), top - 0.12)
    axes[0].set(xlim=(0, 1.03), ylim=(low, top + (top - low) * 0.06))
    axes[0].xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[0].yaxis.set_major_formatter(PercentFormatter(1))
    figure.supxlabel("average share of full FLOPs", fontsize=9.5)
    figure.supylabel("accuracy", fontsize=9.5)
    return figure


def _steps(axis: Axes, curve: CurveSummary, colour: str, width: float) -> None:
    axis.step(
        [*curve.costs, 1.0], [*curve.accuracies, curve.accuracies[-1]], where="post", color=colour, linewidth=width
    )


def families_of(view: CostView) -> list[CurveSummary]:
    """Give the curves of policies, without the oracle, all together and the static exits."""
    return [curve for curve in view.curves if curve.name not in (LABEL_ORACLE, ANY_POLICY, SAME_EXIT)]
