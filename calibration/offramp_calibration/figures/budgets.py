"""Compute asked for against compute taken, and where samples left."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from offramp_calibration.evaluation import Evaluation
from offramp_calibration.figures.style import WIDTH, Theme, depth_colours, ink_on, new_figure


def budgets(evaluation: Evaluation, theme: Theme) -> Figure:
    """Asked against realised compute, and where samples left."""
    results = [(result.asked, result.point) for result in evaluation.budgets if result.point is not None]
    figure, (line, bars) = new_figure(WIDTH, 3.6, 1, 2, gridspec_kw={"width_ratios": (1, 1.5)})
    line.plot((0, 1), (0, 1), color=theme.still, linewidth=1, linestyle=":")
    line.annotate(
        "asked = took",
        (0.5, 0.5),
        (-5, 5),
        textcoords="offset points",
        rotation=45,
        rotation_mode="anchor",
        ha="center",
        color=theme.still,
        fontsize=8.5,
    )
    line.plot([asked for asked, _ in results], [point.compute for _, point in results], "o", color=theme.early)
    line.set(xlabel="compute asked for", ylabel="compute this data took", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    for side in (line.xaxis, line.yaxis):
        side.set_major_formatter(PercentFormatter(1, decimals=0))
    _exit_bars(bars, evaluation, [(f"{asked:.0%}", point.exit_rates) for asked, point in results], theme)
    bars.set_title("share of samples that left at each exit")
    bars.set_ylabel("compute asked for")
    return figure


def _exit_bars(axis: Axes, evaluation: Evaluation, rows: Sequence[tuple[str, Sequence[float]]], theme: Theme) -> None:
    colours = depth_colours(len(evaluation.exits), theme)
    starts = [0.0] * len(rows)
    for index in range(len(evaluation.exits)):
        shares = [rates[index] for _, rates in rows]
        axis.barh(
            [name for name, _ in rows], shares, left=starts, color=colours[index], height=0.78, edgecolor=theme.page
        )
        for row, (share, start) in enumerate(zip(shares, starts, strict=True)):
            if share > 0.07:
                axis.text(
                    start + share / 2,
                    row,
                    f"{share:.0%}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=ink_on(colours[index]),
                )
        starts = [start + share for start, share in zip(starts, shares, strict=True)]
    axis.set(xlim=(0, 1))
    axis.grid(visible=False)
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.invert_yaxis()
    ends = [(0, evaluation.exits[0].name), (len(evaluation.exits) - 1, evaluation.exits[-1].name)]
    handles = [Patch(color=colours[index], label=name) for index, name in dict(ends).items()]
    if len(colours) > 2:
        handles.insert(1, Patch(color=colours[len(colours) // 2], label="…"))
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False, fontsize=8.5)
