"""Which gears a calibration gives above an operator's floor."""

import logging
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offramp_contract.calibration import Calibration, Certificate, OperatingPoint
from offramp_contract.policy_spec import ConfidenceSpec, FixedSpec
from offramp_server.choice import Choice
from offramp_server.engine_settings import EngineSettings
from offramp_server.ladder import MAX_GEARS, Floor, ladder_of, ladder_under

DIGEST = "0" * 64
EXITS = 4
MANIFEST = SimpleNamespace(
    exits=[None] * EXITS, gates=(), native=None, exit_depths=(0.2, 0.4, 0.7, 1.0),
    default_policy=ConfidenceSpec(threshold=0.9),
)  # fmt: skip
FULL = Choice(FixedSpec(exit=EXITS - 1))


def certificate(kind, bound, delta=0.05):
    return Certificate.model_validate(
        {"kind": kind, "method": "crc" if delta is None else "ltt", "bound": bound, "delta": delta, "num_samples": 400,
         "data_digest": DIGEST}
    )  # fmt: skip


def point(name, compute, accuracy, *certificates):
    return OperatingPoint(
        name=name, policy=ConfidenceSpec(threshold=0.5), compute=compute, accuracy=accuracy,
        exit_rates=(0.25,) * EXITS, certificates=certificates,
    )  # fmt: skip


def calibration(*points):
    return Calibration(model_digest=DIGEST, temperatures=(1.0,) * EXITS, operating_points=points)


def names(ladder):
    return [None if gear.point is None else gear.point.name for gear in ladder]


POINTS = calibration(
    point("full", 1.0, 0.95, certificate("accuracy", 0.93), certificate("consistency", 0.0)),
    point("deep", 0.8, 0.95, certificate("accuracy", 0.92), certificate("consistency", 0.01)),
    point("dominated", 0.7, 0.90, certificate("accuracy", 0.92), certificate("consistency", 0.01)),
    point("half", 0.5, 0.92, certificate("accuracy", 0.90), certificate("consistency", 0.03)),
    point("hoped-for", 0.4, 0.93),
    point("on-average", 0.35, 0.93, certificate("accuracy", 0.91, None), certificate("consistency", 0.01, None)),
    point("doubtful", 0.3, 0.92, certificate("accuracy", 0.91, 0.1), certificate("consistency", 0.01, 0.1)),
    point("early", 0.2, 0.85, certificate("accuracy", 0.83), certificate("consistency", 0.12)),
)


@pytest.mark.parametrize(
    ("floor", "expected"),
    [
        (Floor(accuracy=0.9), [None, "deep", "half"]),
        (Floor(accuracy=0.8), [None, "deep", "half", "early"]),
        (Floor(risk=0.03), [None, "deep", "half"]),
        (Floor(risk=0.02), [None, "deep", "dominated"]),  # by what is not above this floor
        (Floor(accuracy=0.8, risk=0.05), [None, "deep", "half"]),
        (Floor(accuracy=0.94), []),
        (Floor(), []),
    ],
)
def test_a_ladder_leads_from_what_requests_get_to_the_cheapest_point_certified_for_the_floor(floor, expected):
    assert names(ladder_of(MANIFEST, POINTS, FULL, floor)) == expected


def test_gear_0_is_the_operators_default_and_nothing_dearer_comes_below_it():
    half = POINTS.operating_points[3]
    ladder = ladder_of(MANIFEST, POINTS, Choice(half.policy, half), Floor(accuracy=0.8))
    assert names(ladder) == ["half", "early"]


def test_a_fixed_exit_is_worth_its_depth():
    ladder = ladder_of(MANIFEST, POINTS, Choice(FixedSpec(exit=1)), Floor(accuracy=0.8))
    assert names(ladder) == [None, "early"]


def test_every_step_says_by_what_it_is_above_the_floor():
    _, *steps = ladder_of(MANIFEST, POINTS, FULL, Floor(accuracy=0.8, risk=0.2))
    assert [[one.kind for one in gear.certificates] for gear in steps] == [["accuracy", "consistency"]] * 3


shares = st.floats(0.05, 1.0)
certificates = st.builds(
    certificate, st.sampled_from(["accuracy", "consistency"]), shares, st.sampled_from([0.01, 0.05, 0.1, None])
)


@settings(deadline=None)
@given(
    st.lists(st.tuples(shares, shares, st.lists(certificates, max_size=4)), max_size=40),
    st.one_of(st.none(), shares),
    st.one_of(st.none(), shares),
    st.floats(0.1, 1.0),
)
def test_no_step_is_uncertified_none_is_beaten_and_each_is_cheaper_than_the_one_before(points, accuracy, risk, start):
    written = [point(str(index), compute, right, *held) for index, (compute, right, held) in enumerate(points)]
    first = point("start", start, 0.5)
    ladder = ladder_of(MANIFEST, calibration(*written), Choice(first.policy, first), Floor(accuracy, risk))
    assert len(ladder) <= MAX_GEARS
    assert len(ladder) != 1
    for before, after in pairwise(gear.point for gear in ladder):
        assert after.compute < before.compute
    steps = [gear.point for gear in ladder[1:]]
    for dearer, cheaper in pairwise(steps):
        assert cheaper.accuracy < dearer.accuracy
    for step in steps:
        held = [one for one in step.certificates if one.delta is not None and one.delta <= 0.05]
        assert accuracy is None or any(one.kind == "accuracy" and one.bound >= accuracy for one in held)
        assert risk is None or any(one.kind == "consistency" and one.bound <= risk for one in held)


def test_of_many_points_so_many_are_taken_that_each_step_saves_about_as_much():
    many = [point(f"p{n}", 0.1 + n / 1000, 0.5 + n / 2000, certificate("accuracy", 0.4)) for n in range(900)]
    ladder = ladder_of(MANIFEST, calibration(*many), FULL, Floor(accuracy=0.4))
    assert len(ladder) == MAX_GEARS
    assert names(ladder)[-1] == "p0"
    costs = [1.0, *(gear.point.compute for gear in ladder[1:])]
    saved = [after / before for before, after in pairwise(costs)]
    assert max(saved) - min(saved) < 0.02


@pytest.mark.parametrize(
    ("given_", "length", "said"),
    [
        ({"gear_floor_accuracy": 0.9}, 3, "net has 3 gears above accuracy 0.9, down to operating point half"),
        ({"gear_floor_risk": 0.001}, 0, "net has no gears: no cheaper operating point is certified for risk 0.001"),
        ({}, 0, None),
        ({"gears": False, "gear_floor_accuracy": 0.9}, 0, None),
    ],
)
def test_the_log_says_which_gears_there_are_where_they_were_asked_for(caplog, given_, length, said):
    caplog.set_level(logging.INFO, "offramp.server")
    bundle = SimpleNamespace(manifest=MANIFEST, calibration=POINTS)
    assert len(ladder_under(EngineSettings(**given_), "net", bundle, FULL)) == length
    assert caplog.messages == ([f"model {said}"] if said else [])


def test_without_a_calibration_there_are_no_gears():
    bundle = SimpleNamespace(manifest=MANIFEST, calibration=calibration())
    assert ladder_under(EngineSettings(gear_floor_accuracy=0.9), "net", bundle, None) == ()
