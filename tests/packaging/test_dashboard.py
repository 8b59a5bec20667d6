"""The committed dashboard and alerts speak of metrics that the server has."""

import json
import re
from pathlib import Path

import pytest
import yaml
from offramp_server.messages import Loaded
from offramp_server.metrics import Metrics
from prometheus_client.parser import text_string_to_metric_families

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
DASHBOARD = json.loads((DASHBOARDS / "offramp.json").read_text())
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"] if panel["type"] != "row"}
(GROUP,) = yaml.safe_load((DASHBOARDS / "prometheus" / "alerts.yml").read_text())["groups"]
ALERTS = {rule["alert"]: rule for rule in GROUP["rules"]}
QUERIES = [panel["targets"][0]["expr"] for panel in PANELS.values()] + [rule["expr"] for rule in ALERTS.values()]
WIDTH = 24


@pytest.fixture(scope="module")
def exposed():
    """Give, for each sample that the server exposes, the values of its labels."""
    metrics = Metrics()
    stages = (("stage_0", "fp32"), ("stage_1", "fp32"))
    metrics.model_added(Loaded("digits", "v", stages, ("exit_0", "exit_1"), ("gate_0",)))
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(metrics.exposition()[0].decode()):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_asks_for_metrics_labels_and_values_that_exist(exposed, query):
    selectors = re.findall(r"\b((?:offramp|process)_\w+)(?:\{([^}]*)\})?", query)
    assert selectors or "up{" in query
    for name, matchers in selectors:
        assert name in exposed
        for label, operator, value in re.findall(r'(\w+)(=~|=)"([^"]*)"', matchers):
            if label == "job":
                continue  # Prometheus adds it
            assert label in exposed[name]
            assert operator == "=~" or value.startswith("$") or value in exposed[name][label], f"{label}={value}"


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_groups_by_labels_that_exist(exposed, query):
    names = re.findall(r"\b(offramp_\w+)", query)
    for labels in re.findall(r"\bby \(([^)]*)\)", query):
        for label in filter(None, map(str.strip, labels.split(","))):
            assert all(label in exposed[name] for name in names)


def test_every_metric_of_ours_is_shown_or_watched(exposed):
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exposed if name.startswith("offramp_")}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bofframp_\w+", " ".join(QUERIES))}
    assert ours - shown == {"offramp_build_info"}


def test_every_panel_is_one_query_and_says_how_to_read_it():
    assert len(PANELS) == sum(panel["type"] != "row" for panel in DASHBOARD["panels"]), "two panels share a title"
    for title, panel in PANELS.items():
        assert len(panel["targets"]) == 1, title
        assert panel["description"], title
        assert panel["targets"][0]["legendFormat"], title
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, title


def test_panels_lie_side_by_side_and_fill_the_page():
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    assert max(x for x, _ in taken) == WIDTH - 1
    assert len(taken) == WIDTH * (1 + max(y for _, y in taken)), "there are holes"


def test_panels_are_numbered():
    assert [panel["id"] for panel in DASHBOARD["panels"]] == list(range(1, len(DASHBOARD["panels"]) + 1))


def test_one_chooses_data_source_model_and_version():
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "model", "version"]


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_bad_it_is_and_what_to_do(name):
    rule = ALERTS[name]
    assert name.startswith("Offramp")
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert rule["annotations"].keys() == {"summary", "description"}
    assert all(text.endswith(".") for text in rule["annotations"].values())
