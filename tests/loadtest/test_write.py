import json
import re
from html.parser import HTMLParser

import pytest
from offramp_loadtest.metrics import ServerSide, StageBatches
from offramp_loadtest.run import LoadTest
from offramp_loadtest.scenario import scenario_of
from offramp_loadtest.summary import Record, summarise
from offramp_loadtest.targets import Answer
from offramp_loadtest.timeline import timeline_of
from offramp_loadtest.write import write_report

FULL = Answer(1, "exit_0", "confident", False, 0.25, 1.0, 2.0, 0)
SERVER = ServerSide({"ok": 40}, {"stage_0": StageBatches(10, 4.0, {"2": 4, "8": 6})})


def load_test(answers, *, server=None, slo_ms=50.0, label=1):
    records = [
        Record(number / 10, number / 10, number / 10 + 0.01, "ok" if answer else "rejected", label, answer, "ask", 0)
        for number, answer in enumerate(answers)
    ]
    scenario = scenario_of({"name": "a <scenario>", "phases": [{"seconds": 4.0, "rate": 10.0}]})
    summary = summarise(records, 4.0, slo_ms, 0, server=server)
    return LoadTest("http://127.0.0.1:1", scenario, summary, tuple(records), 1.8e9, 4.0)


class Page(HTMLParser):
    """Collects what a page shows and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href", "srcset")]

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_shows_every_figure_and_fetches_nothing(tmp_path):
    text = write_report(load_test([FULL] * 40, server=SERVER), tmp_path).read_text()
    page = Page(text)
    assert page.tags.count("svg") == 5
    assert "script" not in page.tags
    assert all(not value for value in page.fetched if not str(value).startswith("#"))
    assert "a <scenario>" in "".join(page.words)
    assert "10.0 right answers a second within 50 ms, of 10.0 asked for" in " ".join("".join(page.words).split())
    assert not re.search("#0[1-7]{1}0[1-7]{1}0[1-7]{1}[^0-9a-f]", text), "a colour stands for one of the page's"


@pytest.mark.parametrize(
    "answers", [[Answer(1)] * 40, [None] * 40, [FULL], []], ids=["static", "refused", "one", "none"]
)
def test_a_page_is_written_whatever_the_server_tells(tmp_path, answers):
    page = Page(write_report(load_test(answers, label=None, slo_ms=None), tmp_path).read_text())
    assert page.tags.count("svg") == {40: 1 if answers[:1] == [None] else 3, 1: 4, 0: 0}[len(answers)]


def test_every_request_is_a_line_and_the_summary_says_what_it_was_measured_under(tmp_path):
    test = load_test([FULL, None, FULL])
    write_report(test, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "raw.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["ok", "rejected", "ok"]
    assert lines[0]["answer"]["exit"] == "exit_0"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["scenario"]["phases"] == [{"seconds": 4.0, "rate": 10.0}]
    assert summary["outcomes"]["rejected"] == 1


def test_the_timeline_holds_every_request_once():
    test = load_test([FULL, None, Answer(2, "exit_1", "deadline", True, 0.5, 1.0, 2.0, 3)] * 20)
    series = timeline_of(test.records, 6.0, 50.0)
    assert sum(sum(values) for values in series.became.values()) * series.bin_s == pytest.approx(60)
    assert sum(series.offered) * series.bin_s == pytest.approx(60)
    assert series.exits["exit_0"] + series.exits["exit_1"] == pytest.approx(1.0)
    assert series.forced == pytest.approx(series.exits["exit_1"])
    assert series.gear == pytest.approx(3 * series.exits["exit_1"])
