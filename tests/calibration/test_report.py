"""The page, its figures and its numbers as files."""

import base64
import io
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from offramp_calibration.advice import PathCosts, advise
from offramp_calibration.evaluate import evaluate
from offramp_calibration.evaluation import Evaluation, Provenance
from offramp_calibration.figures import draw
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.report import render, write_report
from offramp_calibration.timing import HeadCost
from PIL import Image

VOID = {"meta", "img", "br", "source"}
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>'


class Page(HTMLParser):
    """Reads a page strictly: every element is closed where it was opened."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def provenance(data="drawn samples", **known):
    digest = "0" * 64
    return Provenance(digest, digest, known.get("calibrated_on", "1" * 64), 3000, data, digest, "offramp evaluate b")


def advised(evaluation, manifest, calibration, trace):
    """Let the second exit cost more than it can ever save."""
    heads = tuple(HeadCost(10, ms, 0.001) for ms in (0.001, 5.0, 0.001, 0.001))
    costs = PathCosts(100 * np.arange(1.0, 6), np.array([1.0, 7.0, 8.0, 9.0, 10.0]), heads, 1)
    outcomes = Outcomes.of(trace, calibration.temperatures)
    names = [exit_.name for exit_ in manifest.exits]
    return replace(evaluation, advice=advise(outcomes, evaluation.reference.policy, names, costs))


@pytest.fixture(scope="module")
def evaluation(evaluated):
    manifest, calibration, trace = evaluated(num_samples=1500, seed=3)
    plain = evaluate(trace, manifest, calibration, provenance(), milliseconds=[1.0, 2.0, 3.0, 4.0, 5.0])
    return advised(plain, manifest, calibration, trace)


@pytest.fixture(scope="module")
def bare(evaluated):
    manifest, calibration, trace = evaluated(calibrated=False, num_samples=200)
    return evaluate(trace, manifest, calibration, provenance())


@pytest.fixture(scope="module")
def written(evaluation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    samples = {example.index: np.full((8, 6), 40, dtype=np.uint8) for example in evaluation.examples}
    write_report(evaluation, folder, samples)
    return folder


@pytest.fixture(scope="module")
def page(written):
    return Page((written / "index.html").read_text(encoding="utf-8"))


def pngs_in(page):
    """Give every picture of a page, decoded."""
    sources = [attrs.get("src") or attrs["srcset"] for tag, attrs in page.elements if tag in ("img", "source")]
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in sources)
    return [base64.b64decode(source.removeprefix(prefix), validate=True) for source in sources]


def test_the_page_needs_nothing_but_itself(page):
    for tag, attrs in page.elements:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "srcset", "href", "poster", "data", "action"):
                assert value.startswith("data:image/png;base64,")
    style = [attrs for tag, attrs in page.elements if tag == "style"]
    assert style == [{}]


def test_the_page_fetches_nothing_from_its_style_either(written):
    text = (written / "index.html").read_text(encoding="utf-8")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "://" not in text


def test_the_page_forbids_whatever_it_does_not_need(page):
    (policy,) = (attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_page_suits_phones_and_dark_rooms(written, page):
    metas = {attrs.get("name"): attrs.get("content") for tag, attrs in page.elements if tag == "meta"}
    assert "width=device-width" in metas["viewport"]
    assert metas["color-scheme"] == "light dark"
    sources = [attrs for tag, attrs in page.elements if tag == "source"]
    assert {attrs["media"] for attrs in sources} == {"(prefers-color-scheme: dark)"}
    assert len(sources) == len(list((written / "figures").glob("*-dark.png")))


def test_every_figure_is_a_file_too_and_has_words_for_who_cannot_see_it(written, page):
    shown = set(pngs_in(page))
    files = sorted((written / "figures").iterdir())
    names = ("budgets", "overthinking", "policies", "reliability", "trade-off")
    assert [path.name for path in files] == sorted(
        f"{name}{suffix}" for name in names for suffix in ("-dark.png", ".png")
    )
    assert {path.read_bytes() for path in files} <= shown
    pictures = [attrs for tag, attrs in page.elements if tag == "img"]
    assert all(len(attrs["alt"]) > 10 for attrs in pictures)
    assert sum(tag == "figcaption" for tag, _ in page.elements) == len(names)
    assert {Image.open(io.BytesIO(path.read_bytes())).width for path in files} == {1152}


def test_the_numbers_on_the_page_are_those_of_the_json(written, page):
    numbers = Evaluation.from_json((written / "report.json").read_bytes())
    percent = "{:.1f} %".format
    words = page.words
    for exit_ in numbers.exits:
        assert percent(100 * exit_.calibrated.accuracy.value) in words
        assert f"{exit_.uncalibrated.nll:.3f} → {exit_.calibrated.nll:.3f}" in words
    for result in numbers.budgets:
        low, high = result.point.accuracy.interval
        assert result.point.name in words
        assert f"{percent(100 * result.point.accuracy.value)} {100 * low:.1f}–{100 * high:.1f}" in words
    assert percent(100 * numbers.overthinking.wasteful) in words
    assert percent(100 * numbers.overthinking.destructive) in words
    assert numbers.provenance.command in words


def test_the_page_says_which_exit_to_merge(evaluation, page):
    assert evaluation.advice.merge == (1,)
    assert "On this machine exit_1 costs more than it saves" in page.words


def test_the_same_evaluation_gives_the_same_files(evaluation, written, tmp_path):
    samples = {example.index: np.full((8, 6), 40, dtype=np.uint8) for example in evaluation.examples}
    write_report(evaluation, tmp_path, samples)
    for path in written.rglob("*.*"):
        assert (tmp_path / path.relative_to(written)).read_bytes() == path.read_bytes(), path.name


def test_examples_are_shown_as_the_pictures_they_are(evaluation, page):
    pictures = [Image.open(io.BytesIO(png)) for png in pngs_in(page)]
    small = [picture for picture in pictures if picture.size == (6, 8)]
    assert len(small) == len(evaluation.examples)
    assert {picture.getpixel((0, 0)) for picture in small} == {40}


def test_large_pictures_are_made_small(bare):
    samples = {example.index: np.zeros((900, 1200, 3), dtype=np.uint8) for example in bare.examples}
    page = Page(render(bare, {}, samples))
    assert (160, 120) in {Image.open(io.BytesIO(png)).size for png in pngs_in(page)}


def test_hostile_texts_and_names_are_shown_and_not_obeyed(bare):
    examples = tuple(replace(example, label=HOSTILE, prediction=HOSTILE) for example in bare.examples)
    hostile = replace(bare, examples=examples, provenance=provenance(data=HOSTILE), model=HOSTILE)
    samples = {example.index: HOSTILE + "a" * 5000 for example in examples}
    page = Page(render(hostile, {}, samples))
    assert not any(tag == "script" or "onerror" in attrs for tag, attrs in page.elements)
    assert HOSTILE in page.words
    assert "a" * 300 not in page.words


def test_a_report_of_a_bundle_that_is_not_calibrated_says_how_to_calibrate_it(bare):
    figures = draw(bare)
    page = Page(render(bare, figures, {}))
    assert "offramp calibrate" in page.words
    assert "Asking for compute" not in page.words
    assert sorted(figures) == ["overthinking", "reliability", "trade-off"]


def test_numbers_from_the_calibrations_own_data_are_called_optimistic(evaluated):
    manifest, calibration, trace = evaluated(num_samples=300)
    known = calibration.model_copy(update={"data_digest": trace.about.data_digest})
    same = replace(provenance(), data_digest=trace.about.data_digest, calibration_data_digest=trace.about.data_digest)
    page = Page(render(evaluate(trace, manifest, known, same), {}, {}))
    assert "caution same_data" in {attrs.get("class") for _, attrs in page.elements}
    assert "every number here is optimistic" in page.words
    assert "on data that calibration has not seen" not in page.words


@pytest.mark.system
def test_a_browser_shows_the_page_without_complaint(written, tmp_path):
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}",
        "--dump-dom",
        (written / "index.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr  # what a page's console says is logged under this word
    shown = Page(done.stdout)
    assert shown.words == Page((written / "index.html").read_text(encoding="utf-8")).words
