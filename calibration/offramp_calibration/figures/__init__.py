"""Draws an evaluation: few figures, each with one thing to see, in colours that the colour-blind tell apart.

Every figure is drawn for light and for dark pages. What is drawn comes from the record alone, and the same record gives
the same file.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from matplotlib.figure import Figure

from offramp_calibration.evaluation import Evaluation
from offramp_calibration.figures.budgets import budgets
from offramp_calibration.figures.gates import gates
from offramp_calibration.figures.overthinking import overthinking
from offramp_calibration.figures.policies import families_of, policies
from offramp_calibration.figures.reliability import reliability
from offramp_calibration.figures.style import THEMES, Theme, styled
from offramp_calibration.figures.trade_off import trade_off

DPI: Final = 160

Draw: TypeAlias = Callable[[Evaluation, Theme], Figure]


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure for the page.

    Attributes:
        name: Of its file, without suffix.
        light: PNG for light pages.
        dark: PNG for dark pages.
        size: Width and height in pixels.
    """

    name: str
    light: bytes
    dark: bytes
    size: tuple[int, int]


def draw(evaluation: Evaluation) -> dict[str, Picture]:
    """Draw every figure that the evaluation has something to show in, by name."""
    figures: dict[str, tuple[Draw, bool]] = {
        "trade-off": (trade_off, True),
        "budgets": (budgets, any(result.point for result in evaluation.budgets)),
        "policies": (policies, len(families_of(evaluation.compute)) > 1),
        "reliability": (reliability, True),
        "overthinking": (overthinking, len(evaluation.exits) > 1),
        "gates": (gates, evaluation.gates is not None),
    }
    return {name: _picture(name, figure, evaluation) for name, (figure, wanted) in figures.items() if wanted}


def _picture(name: str, figure_of: Draw, evaluation: Evaluation) -> Picture:
    drawn = []
    for theme in THEMES:
        with styled(theme):
            figure = figure_of(evaluation, theme)
            content = io.BytesIO()
            figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
            drawn.append(content.getvalue())
            size = tuple(round(inches * DPI) for inches in figure.get_size_inches())
    return Picture(name, drawn[0], drawn[1], (size[0], size[1]))
