"""Writes a load test as a page that people look at, a summary, and every request.

The page holds all it shows: no script, and nothing is fetched from anywhere.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from offramp_loadtest.figures import draw
from offramp_loadtest.run import LoadTest
from offramp_loadtest.summary import PERCENTILES
from offramp_loadtest.timeline import timeline_of

PAGE: Final = "report.html"
SUMMARY: Final = "summary.json"
RECORDS: Final = "raw.jsonl"


def write_report(test: LoadTest, folder: Path | str) -> Path:
    """Write `report.html`, `summary.json` and `raw.jsonl`, a line per request; files of these names are replaced.

    Args:
        test: What has run.
        folder: Where; made if it is not there.

    Returns:
        The page.

    Raises:
        OSError: If the folder cannot be written to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY).write_bytes(orjson.dumps(summary_document(test), option=orjson.OPT_INDENT_2) + b"\n")
    with (folder / RECORDS).open("wb") as file:
        for record in sorted(test.records, key=lambda record: record.due_s):
            file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
    page = folder / PAGE
    page.write_text(_page(test), encoding="utf-8")
    return page


def summary_document(test: LoadTest) -> dict[str, Any]:
    """Give the summary with what it was measured under, as plain JSON types."""
    scenario = test.scenario.model_dump(mode="json", exclude_defaults=True)
    began = datetime.fromtimestamp(test.began_at, UTC).isoformat(timespec="seconds")
    return {"url": test.url, "began": began, "scenario": scenario} | test.summary.to_json()


def _page(test: LoadTest) -> str:
    environment = Environment(
        loader=PackageLoader("offramp_loadtest"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "ms": _milliseconds}
    figures = draw(test, timeline_of(test.records, test.planned_s, test.summary.slo_ms))
    return environment.get_template("report.html.j2").render(
        test=test,
        summary=test.summary,
        figures={name: Markup(svg) for name, svg in figures.items()},
        began=datetime.fromtimestamp(test.began_at, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        percentiles=[*PERCENTILES, "max"],
        latencies=latencies_of(test),
        scenario=orjson.dumps(
            test.scenario.model_dump(mode="json", exclude_defaults=True), option=orjson.OPT_INDENT_2
        ).decode(),
    )


def latencies_of(test: LoadTest) -> dict[str, Mapping[str, float]]:
    """Give the rows of the table of percentiles that are known."""
    summary = test.summary
    rows = {
        "latency, since due": summary.latency_ms,
        "waited in the server": summary.queue_ms,
        "stages ran": summary.compute_ms,
        "client behind": summary.client_lag_ms,
        "no connection free": summary.connection_wait_ms,
    }
    return {name: row for name, row in rows.items() if row}


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"
