"""Writes an evaluation as a page that people look at, its figures as files, and every number as JSON.

The page holds all it shows: no script, and nothing is fetched from anywhere.
"""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from offramp_calibration import captions
from offramp_calibration.evaluation import Evaluation
from offramp_calibration.figures import Picture, draw
from offramp_calibration.labelled import HumanForm
from offramp_calibration.measured import ACCURACY_LOSSES, SHARES_OF_FULL_COST, Proportion

PAGE: Final = "index.html"
NUMBERS: Final = "report.json"
FIGURES: Final = "figures"
MAX_PICTURE_SIDE: Final = 160
MAX_TEXT_LENGTH: Final = 280
_GROUPS: Final = {
    "early": "Left first: the surest",
    "late": "Went deepest: the least sure",
    "cost": "Left early and wrong, where full depth is right",
}
_GATED_GROUPS: Final = {
    "early": "Ran least: the surest",
    "late": "Ran most: the least sure",
    "cost": "Wrong, where full depth is right",
}


def write_report(evaluation: Evaluation, folder: Path, samples: Mapping[int, HumanForm | None] | None = None) -> Path:
    """Write `index.html`, `report.json` and `figures/`; files of these names are replaced.

    Args:
        evaluation: What to show.
        folder: Where; made if it is not there.
        samples: Pictures or texts of the samples that the evaluation's examples name, by their index.

    Returns:
        The page.

    Raises:
        OSError: If the folder cannot be written to.
    """
    figures = draw(evaluation)
    page = render(evaluation, figures, samples or {})
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    for figure in figures.values():
        (folder / FIGURES / f"{figure.name}.png").write_bytes(figure.light)
        (folder / FIGURES / f"{figure.name}-dark.png").write_bytes(figure.dark)
    (folder / NUMBERS).write_bytes(evaluation.to_json())
    path = folder / PAGE
    path.write_text(page, encoding="utf-8")
    return path


def render(evaluation: Evaluation, figures: Mapping[str, Picture], samples: Mapping[int, HumanForm | None]) -> str:
    """Write the page.

    Args:
        evaluation: What to show.
        figures: Drawn from it, by name.
        samples: Pictures or texts of its examples, by their index.
    """
    environment = Environment(
        loader=PackageLoader("offramp_calibration"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": captions.percent,
        "ms": lambda value: "–" if value is None else f"{value:.3g}",
        "number": lambda value, digits=3: "–" if value is None else f"{value:.{digits}f}",
        "interval": _interval,
        "picture": _picture,
        "source": _source,
        "text": _text,
    }
    return environment.get_template("report.html.j2").render(
        evaluation=evaluation,
        figures=figures,
        words=captions.words_of(evaluation),
        captions=captions,
        samples=samples,
        shares=SHARES_OF_FULL_COST,
        losses=ACCURACY_LOSSES,
        groups=_GROUPS if evaluation.gates is None else _GATED_GROUPS,
    )


def _interval(share: Proportion) -> Markup:
    low, high = share.interval
    return Markup('<b>{}</b> <span class="interval">{:.1f}–{:.1f}</span>').format(
        captions.percent(share.value), 100 * low, 100 * high
    )


def _source(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _picture(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
    content = io.BytesIO()
    image.save(content, "PNG")
    return _source(content.getvalue())


def _text(text: str) -> str:
    return text if len(text) <= MAX_TEXT_LENGTH else f"{text[:MAX_TEXT_LENGTH]}…"
