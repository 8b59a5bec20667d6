"""Accuracy against compute, with what is possible above and the same exit for all below."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from offramp_calibration.evaluate import LABEL_ORACLE
from offramp_calibration.evaluation import CostView, Evaluation
from offramp_calibration.figures.style import WIDTH, Theme, new_figure
from offramp_calibration.measured import MeasuredPoint


def trade_off(evaluation: Evaluation, theme: Theme) -> Figure:
    """Accuracy over compute, and over milliseconds where they are known."""
    both = evaluation.milliseconds is not None
    figure, axes = new_figure(WIDTH, 4.4 if not both else 4.0, 1, 1 + both, sharey=True)
    costs = [("compute", "average share of full FLOPs")] + [
        ("milliseconds", "average milliseconds, one at a time")
    ] * both
    for axis, (cost, label) in zip(axes, costs, strict=True):
        view = evaluation.compute if cost == "compute" else evaluation.milliseconds
        if view is not None:
            _costs_and_accuracies(axis, evaluation, view, cost, theme)
        axis.set_xlabel(label)
    axes[0].set_ylabel("accuracy")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1))
    axes[0].xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[0].set_xlim(0, 1.03)
    shown = [point.accuracy.value for point in evaluation.static]
    shown += [evaluation.label_oracle.accuracy.value] if evaluation.label_oracle is not None else []
    shown += _adaptive_path(evaluation, "compute")[1] if evaluation.gates is not None else []
    room = (max(shown) - min(shown)) * 0.08 + 0.002
    axes[0].set_ylim(min(shown) - room, min(max(shown) + room, 1.004))
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8.5
    )
    return figure


def _costs_and_accuracies(axis: Axes, evaluation: Evaluation, view: CostView, cost: str, theme: Theme) -> None:
    _oracles(axis, evaluation, view, cost, theme)
    static = [getattr(point, cost) for point in evaluation.static]
    accuracies = [point.accuracy.value for point in evaluation.static]
    same = "the same exit for all" if len(static) > 1 else "full depth"
    axis.plot(static, accuracies, "s:", color=theme.still, linewidth=1, markersize=5, label=same)
    for index in _labelled(len(static)):
        name = evaluation.static[index].name
        place = (static[index], accuracies[index])
        last = index == len(static) - 1
        axis.annotate(
            name,
            place,
            (4, -12),
            textcoords="offset points",
            ha="right" if last else "left",
            color=theme.still,
            fontsize=8,
        )
    path = _adaptive_path(evaluation, cost)
    swept = "confidence thresholds" if evaluation.gates is None else "gate thresholds"
    label = "operating points that budgets choose" if evaluation.is_calibrated else swept
    axis.plot(*path, "-", color=theme.early, linewidth=2, label=label)
    asked = {result.point.name: result.point for result in evaluation.budgets if result.point is not None}
    if asked:
        axis.errorbar(
            [getattr(point, cost) for point in asked.values()],
            [point.accuracy.value for point in asked.values()],
            yerr=_error_bars(list(asked.values())),
            fmt="o",
            color=theme.early,
            elinewidth=1,
            markersize=6,
            label="chosen for compute 0.3 … 0.9",
            zorder=5,
        )
    if cost == "milliseconds":
        axis.set_xlim(0, view.full * 1.03)


def _oracles(axis: Axes, evaluation: Evaluation, view: CostView, cost: str, theme: Theme) -> None:
    oracle = next((curve for curve in view.curves if curve.name == LABEL_ORACLE), None)
    if oracle is not None:
        axis.plot(
            oracle.costs,
            oracle.accuracies,
            color=theme.best,
            linewidth=1.2,
            linestyle=(0, (4, 2)),
            label="best possible",
        )
    for point, marker in ((evaluation.label_oracle, "*"), (evaluation.agreement_oracle, "P")):
        if point is not None:
            axis.plot(
                getattr(point, cost),
                point.accuracy.value,
                marker,
                color=theme.best,
                markersize=9,
                label=point.family,
                zorder=4,
            )


def _adaptive_path(evaluation: Evaluation, cost: str) -> tuple[list[float], list[float]]:
    """Give the points a budget may choose, in calibration's order: nothing is chosen on the data that is shown."""
    if evaluation.is_calibrated:
        by_name = {point.name: point for point in evaluation.points}
        points = [by_name[name] for name in evaluation.chosen]
    else:
        points = sorted(evaluation.points, key=lambda point: point.compute)
    return [getattr(point, cost) for point in points], [point.accuracy.value for point in points]


def _error_bars(points: Sequence[MeasuredPoint]) -> list[list[float]]:
    below = [point.accuracy.value - point.accuracy.interval[0] for point in points]
    above = [point.accuracy.interval[1] - point.accuracy.value for point in points]
    return [below, above]


def _labelled(count: int, most: int = 8) -> list[int]:
    """Give the places of the exits that have room for a name."""
    return list(range(count)) if count <= most else [0, count - 1]
