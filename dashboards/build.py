"""Writes the Grafana dashboard, `offramp.json`, from `panels.py`; run by `make dashboards`."""

import sys
from pathlib import Path

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as model
from panels import ROWS, Panel

OUTPUT = Path(__file__).with_name("offramp.json")
SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")

GOOD, BAD, WARNING, CALM = "green", "red", "orange", "blue"
COLORS = {
    "{{outcome}}": {
        "ok": GOOD,
        "error": BAD,
        "invalid": "purple",
        "cancelled": "#8e8e8e",
        "deadline": WARNING,
        "rejected": "yellow",
    },
    "{{kind}}": {"forced": WARNING, "voluntary": CALM},
    "{{decision}}": {"open": CALM, "shut": GOOD, "forced": WARNING},
    "{{share}}": {"average depth": WARNING, "compute saved": GOOD},
    "{{quantile}}": {
        "p1": BAD,
        "p10": WARNING,
        "p50": "super-light-blue",
        "p90": CALM,
        "p95": CALM,
        "p99": "dark-blue",
    },
}
"""For each legend whose series are known beforehand, their colours: the same thing looks the same in every panel."""


def build() -> model.Dashboard:
    """Give the dashboard."""
    page = (
        dashboard.Dashboard("Offramp")
        .uid("offramp")
        .description("Early-exit serving: who asks, how deep rows go, what that saves, and whether budgets are kept.")
        .tags(["offramp"])
        .time("now-30m", "now")
        .refresh("10s")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_choice("model", "Model", "label_values(offramp_inflight_samples, model)"))
        .with_variable(
            _choice("version", "Version", 'label_values(offramp_inflight_samples{model="$model"}, version)')
            .include_all(True)
            .all_value(".*")
            .multi(True)
            .current(model.VariableOption(text="All", value="$__all", selected=True))
        )
    )
    for title, panels in ROWS:
        page.with_row(dashboard.Row(title))
        for panel in panels:
            page.with_panel(_drawn(panel))
    return _numbered(page.build())


def text() -> str:
    """Give the dashboard as Grafana reads it."""
    return JSONEncoder(sort_keys=True, indent=2).encode(build()) + "\n"


def _choice(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
    )


def _drawn(panel: Panel) -> Builder[model.Panel]:
    query = prometheus.Dataquery().expr(panel.query).legend_format(panel.legend or panel.title).ref_id("A")
    if panel.look == "number":
        return _number(panel, query.range())
    return _bars(panel, query.instant()) if panel.look == "bars" else _course(panel, query.range())


def _number(panel: Panel, query: prometheus.Dataquery) -> stat.Panel:
    colors = zip((None, *panel.limits), (GOOD, WARNING, BAD), strict=False)
    steps = [model.Threshold(value=limit, color=color) for limit, color in colors]
    return (
        stat.Panel()
        .title(panel.title)
        .description(panel.description)
        .datasource(SOURCE)
        .with_target(query)
        .unit(panel.unit)
        .span(panel.width)
        .height(4)
        .graph_mode(shapes.BigValueGraphMode.AREA)
        .thresholds(dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .no_value("no traffic")
    )


def _bars(panel: Panel, query: prometheus.Dataquery) -> bargauge.Panel:
    return (
        bargauge.Panel()
        .title(panel.title)
        .description(panel.description)
        .datasource(SOURCE)
        .with_target(query)
        .unit(panel.unit)
        .span(panel.width)
        .height(8)
        .min(0)
        .color_scheme(dashboard.FieldColor().mode(model.FieldColorModeId.CONTINUOUS_BL_PU))
        .orientation(shapes.VizOrientation.HORIZONTAL)
        .display_mode(shapes.BarGaugeDisplayMode.BASIC)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def _course(panel: Panel, query: prometheus.Dataquery) -> timeseries.Panel:
    drawn = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.description)
        .datasource(SOURCE)
        .with_target(query)
        .unit("percentunit" if panel.look == "shares" else panel.unit)
        .span(panel.width)
        .height(8)
        .line_width(2 if panel.look == "lines" else 1)
        .fill_opacity(0 if panel.look == "lines" else 60)
        .show_points(shapes.VisibilityMode.NEVER)
        .legend(common.VizLegendOptions().display_mode(shapes.LegendDisplayMode.LIST).show_legend(True))
        .tooltip(common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI).sort(shapes.SortOrder.DESCENDING))
    )
    for name, color in COLORS.get(panel.legend, {}).items():
        drawn.override_by_name(name, [model.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": color})])
    if panel.look == "lines":
        return drawn
    mode = shapes.StackingMode.PERCENT if panel.look == "shares" else shapes.StackingMode.NORMAL
    return drawn.min(0).stacking(common.StackingConfig().mode(mode).group("A"))


def _numbered(page: model.Dashboard) -> model.Dashboard:
    """Give every panel an id of its own, in order, so that the text changes only where the dashboard does."""
    for number, panel in enumerate(page.panels or [], start=1):
        panel.id_val = number
    return page


if __name__ == "__main__":
    if sys.argv[1:] == ["-"]:
        sys.stdout.write(text())
    else:
        OUTPUT.write_text(text())
