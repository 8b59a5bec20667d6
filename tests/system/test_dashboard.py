"""Every panel shows something, and every alert can be evaluated, on what a real Prometheus scraped from a real run."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
DASHBOARD = json.loads((DASHBOARDS / "offramp.json").read_text())
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"] if panel["type"] != "row"}
WHOLE_SERVER = {"Requests by model", "Compute saved since load", "CPU", "Memory"}
MAY_BE_ZERO = {"Rows in flight", "Gear"}
GATED = {"Gates open", "Gate decisions, over time"}
"""Panels of networks with gates; the run serves one beside the other network."""
SPAN_S = 60  # holds the whole run, and ends where everything has been scraped


def filled_in(expr, model="digits"):
    """Put values in the place of the dashboard's variables, as Grafana does."""
    variables = {"$__rate_interval": "1m", "$__range": "5m", "$model": model, "$version": ".*"}
    for name, value in variables.items():
        expr = expr.replace(name, value)
    assert "$" not in expr, f"an unknown variable is left: {expr}"
    return expr


def evaluated(observed, panel, **variables):
    """Give the panel's series: their labels and their finite values."""
    (target,) = panel["targets"]
    expr = filled_in(target["expr"], **variables)
    if target.get("instant"):
        series = [(one["metric"], [one["value"]]) for one in observed.prometheus.query(expr)]
    else:
        found = observed.prometheus.query_range(expr, observed.ended - SPAN_S, observed.ended)
        series = [(one["metric"], one["values"]) for one in found]
    numbers = [(labels, [float(value) for _, value in values]) for labels, values in series]
    return [(labels, [value for value in values if math.isfinite(value)]) for labels, values in numbers]


def test_the_committed_dashboard_is_what_its_code_writes():
    written = subprocess.run([sys.executable, DASHBOARDS / "build.py", "-"], capture_output=True, text=True, check=True)
    assert written.stdout == (DASHBOARDS / "offramp.json").read_text(), "run `make dashboards`"


@pytest.mark.parametrize("title", PANELS)
def test_every_panel_shows_data(observed, title):
    series = evaluated(observed, PANELS[title], model="gated" if title in GATED else "digits")
    values = [value for _, values in series for value in values]
    assert values, f"{title} shows nothing"
    assert title in MAY_BE_ZERO or any(value != 0 for value in values), f"{title} shows nothing but zeros"


@pytest.mark.parametrize("title", [title for title in PANELS if title not in WHOLE_SERVER])
def test_a_panel_shows_the_chosen_model_only(observed, title):
    assert evaluated(observed, PANELS[title], model="nobody") == []


@pytest.mark.parametrize("title", PANELS)
def test_the_labels_that_a_legend_names_are_there(observed, title):
    labels = re.findall(r"\{\{(\w+)\}\}", PANELS[title]["targets"][0]["legendFormat"])
    for series, _ in evaluated(observed, PANELS[title], model="gated" if title in GATED else "digits"):
        assert set(labels) <= series.keys()


def test_the_choices_at_the_top_of_the_page_have_values(observed):
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] != "query":
            continue
        selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]).groups()
        found = observed.prometheus.query(filled_in(selector), observed.ended)  # later, it is forgotten in 5 minutes
        assert found
        assert all(label in series["metric"] for series in found)


def test_the_gate_panels_show_what_the_gates_decided(observed):
    """Over rows that open the first gate, the second, and both, at ease; and again with no time for any."""
    shares = {labels["gate"]: values for labels, values in evaluated(observed, PANELS["Gates open"], model="gated")}
    assert set(shares) == {"gate_0", "gate_1"}
    decided = evaluated(observed, PANELS["Gate decisions, over time"], model="gated")
    assert {labels["decision"] for labels, values in decided if any(values)} == {"open", "shut", "forced"}


def test_shares_lie_between_nothing_and_all(observed):
    shares = [panel for panel in PANELS.values() if panel["fieldConfig"]["defaults"].get("unit") == "percentunit"]
    # Of rates that are stacked to a whole, Grafana makes shares; the query gives rows a second.
    shares = [
        panel
        for panel in shares
        if panel["fieldConfig"]["defaults"].get("custom", {}).get("stacking", {}).get("mode") != "percent"
    ]
    assert len(shares) > 3
    for panel in shares:
        for _, values in evaluated(observed, panel) + evaluated(observed, panel, model="gated"):
            assert all(-1e-9 <= value <= 1 + 1e-9 for value in values), panel["title"]


def test_every_alert_is_evaluated_without_an_error(observed):
    rules = observed.prometheus.rules()
    assert len(rules) >= 8
    assert {rule["name"]: rule["health"] for rule in rules} == {rule["name"]: "ok" for rule in rules}
    (down,) = [rule for rule in rules if rule["name"] == "OfframpDown"]
    assert down["state"] == "inactive"


def test_rows_that_were_no_numbers_raise_their_alert(observed):
    (rule,) = [rule for rule in observed.prometheus.rules() if rule["name"] == "OfframpNotFinite"]
    assert rule["state"] == "firing"
    assert rule["alerts"][0]["labels"]["model"] == "digits"


@pytest.mark.parametrize(
    "command",
    [
        ("check", "config", DASHBOARDS / "prometheus" / "prometheus.yml"),
        ("check", "rules", DASHBOARDS / "prometheus" / "alerts.yml"),
        ("test", "rules", Path(__file__).with_name("alerts_test.yml")),
    ],
    ids=["config", "rules", "rules fire"],
)
def test_promtool_finds_nothing_wrong(command):
    done = subprocess.run(["promtool", *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_exposition_is_what_prometheus_asks_of_one(observed):
    target = observed.prometheus.client.get("/api/v1/targets").json()["data"]["activeTargets"][0]
    exposition = observed.prometheus.client.get(target["scrapeUrl"]).text
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=exposition, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
