"""Which exit is right first, and whether the network's last word still is."""

from collections.abc import Sequence
from typing import Final

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from offramp_calibration.evaluation import Evaluation
from offramp_calibration.figures.style import WIDTH, Theme, new_figure

MAX_BARS: Final = 24


def overthinking(evaluation: Evaluation, theme: Theme) -> Figure:
    """Which exit is right first, and whether the network's last word still is."""
    thinking = evaluation.overthinking
    # Of a very deep network the bars after the first few are slivers; they are drawn together.
    lasting, lost = _folded(thinking.lasting), _folded(thinking.lost)
    names = [exit_.name for exit_ in evaluation.exits[: len(lasting)]]
    if len(evaluation.exits) > MAX_BARS:
        names[-1] = "later"
    figure, (axis,) = new_figure(WIDTH, 1.1 + 0.3 * (len(names) + 1))
    rows = [*names, "never"]
    axis.barh(rows, [*lasting, 0.0], color=theme.early, label="and is still right at full depth")
    axis.barh(
        rows,
        [*lost, 0.0],
        left=[*lasting, 0.0],
        color=theme.bad,
        hatch="////",
        edgecolor=theme.page,
        linewidth=0,
        label="but full depth is wrong",
    )
    axis.barh(rows, [*[0.0] * len(names), thinking.never_right], color=theme.still)
    totals = [*(kept + gone for kept, gone in zip(lasting, lost, strict=True)), thinking.never_right]
    for row, total in enumerate(totals):
        axis.annotate(f"{total:.1%}", (total, row), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    axis.set(xlabel="share of samples", ylabel="first right at", xlim=(0, min(1.0, max(totals) * 1.15)))
    axis.grid(visible=False, axis="y")
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.invert_yaxis()
    axis.legend(loc="lower right", frameon=False, fontsize=8.5)
    return figure


def _folded(shares: Sequence[float]) -> list[float]:
    if len(shares) <= MAX_BARS:
        return list(shares)
    return [*shares[: MAX_BARS - 1], sum(shares[MAX_BARS - 1 :])]
