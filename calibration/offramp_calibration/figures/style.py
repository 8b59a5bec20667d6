"""How figures look: the colours of light and dark pages, which all kinds of colour vision tell apart, and the type."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MAX_PANELS: Final = 12
WIDTH: Final = 7.2
"""Inches; all figures are so wide, but for small ones."""


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a page: `early` is what adapts, `still` what does not, `best` the possible, `bad` what went wrong."""

    name: str
    page: str
    ink: str
    faint: str
    early: str
    still: str
    best: str
    bad: str
    shallow_to_deep: tuple[str, str]


# Blue and orange of Okabe and Ito's palette, which all kinds of colour vision tell apart, lightened for dark pages.
LIGHT: Final = Theme(
    "light", "#ffffff", "#1f2328", "#d9dde1", "#0072b2", "#7a8087", "#b35900", "#c0392b", ("#bfe0f2", "#08415c")
)
DARK: Final = Theme(
    "dark", "#14181d", "#e6e9ec", "#343b43", "#56b4e9", "#9aa3ad", "#f0a030", "#ff7b6b", ("#1d4a63", "#c9ebff")
)
THEMES: Final = (LIGHT, DARK)


@contextmanager
def styled(theme: Theme) -> Iterator[None]:
    """Draw in a theme."""
    plain = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), theme.ink)
    faint = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), theme.faint)
    shape: dict[str, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.6,
        "figure.facecolor": theme.page,
        "savefig.facecolor": theme.page,
        "axes.facecolor": theme.page,
    }
    with mpl.rc_context(plain | faint | shape):
        yield


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Make a figure of so many inches with rows and columns of axes."""
    # Not pyplot's: it keeps what it makes, and asks for a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def depth_colours(count: int, theme: Theme) -> list[str]:
    """Give as many colours as there are exits, from shallow to deep."""
    ramp = mpl.colors.LinearSegmentedColormap.from_list("depth", theme.shallow_to_deep)
    return [mpl.colors.to_hex(ramp(index / max(count - 1, 1))) for index in range(count)]


def ink_on(colour: str) -> str:
    """Give what can be read on a colour."""
    red, green, blue = mpl.colors.to_rgb(colour)
    return "#101418" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "#ffffff"


def grid(count: int) -> tuple[int, int]:
    """Give rows and columns for so many panels, at most four wide and as even as can be."""
    rows = math.ceil(count / 4)
    return rows, math.ceil(count / rows)
