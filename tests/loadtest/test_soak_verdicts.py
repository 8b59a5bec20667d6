"""What a soak decides from both sides' counts and the server's memory."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "loadtest/benchmarks"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak_verdicts", BENCHMARKS / "soak_verdicts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def counted(soak):
    return soak.Counted(
        client={"ok": 900, "rejected": 20, "deadline": 5, "invalid": 50, "left": 25},
        server={"ok": 915, "rejected": 21, "deadline": 5, "invalid": 50, "cancelled": 14, "error": 0},
        server_rows=915,
        warm_up=5,
        inflight=0,
    )


def flat(soak, *, late_bytes=0.0):
    return soak.Memory(tuple((float(s), 200 * 2**20 + (late_bytes if s > 75 else 0.0)) for s in range(1, 101)))


def bad(soak, counted, memory):
    return [verdict.claim for verdict in soak.verdicts_of(counted, memory) if not verdict.is_good]


def test_a_soak_after_which_everything_adds_up_is_good(soak, counted):
    assert bad(soak, counted, flat(soak)) == []


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        ({"client": {"ok": 899, "timeout": 1}}, "every client that waited has one answer"),
        ({"client": {"ok": 899, "error": 1}}, "every client that waited has one answer"),
        ({"client": {"invalid": 51}}, "bad requests are refused, and counted"),
        ({"server": {"ok": 904}}, "both sides count the same `ok`, but for who left"),
        ({"server": {"ok": 931}}, "both sides count the same `ok`, but for who left"),
        ({"server": {"rejected": 19}}, "both sides count the same `rejected`, but for who left"),
        ({"server": {"error": 1}}, "no request failed; only those who left were cancelled"),
        ({"server": {"cancelled": 26}}, "no request failed; only those who left were cancelled"),
        ({"server_rows": 914}, "each answered request is one answered row"),
        ({"server_rows": 941}, "each answered request is one answered row"),
        ({"inflight": 1}, "nothing is in flight in the end"),
    ],
)
def test_what_does_not_add_up_is_named(soak, counted, change, claim):
    merged = {
        name: {**getattr(counted, name), **value} if isinstance(value, dict) else value
        for name, value in change.items()
    }
    assert claim in bad(soak, replace(counted, **merged), flat(soak))


def test_memory_that_grows_is_not_flat_and_one_page_is_no_growth(soak, counted):
    (claim,) = bad(soak, counted, flat(soak, late_bytes=9 * 2**20))
    assert claim.startswith("memory grows by at most")
    assert bad(soak, counted, flat(soak, late_bytes=7 * 2**20)) == []


def test_the_slope_is_that_of_the_time_after_the_first_quarter(soak):
    climbs_at_first = soak.Memory(tuple((float(s), 2**20 * min(s, 20.0)) for s in range(1, 101)))
    assert climbs_at_first.slope_per_hour == pytest.approx(0.0, abs=1.0)
    climbs = soak.Memory(tuple((float(s), 1000.0 * s) for s in range(1, 101)))
    assert climbs.slope_per_hour == pytest.approx(3.6e6)
