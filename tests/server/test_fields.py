import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offramp_contract.calibration import Calibration, Certificate, OperatingPoint
from offramp_contract.errors import InvalidValue, OfframpError, RequestError
from offramp_contract.manifest import Manifest
from offramp_contract.policy_spec import ConfidenceSpec, EntropySpec, PatienceSpec
from offramp_runtime import open_bundle
from offramp_server.choice import parse_defaults
from offramp_server.fields import FIELDS, NoLimits, Routing, fields_of_text, read_routing


def certificate(kind: str, bound: float) -> Certificate:
    return Certificate(kind=kind, method="ltt", bound=bound, delta=0.05, num_samples=500, data_digest="0" * 64)  # type: ignore[arg-type]


CRC = Certificate(kind="accuracy_loss", method="crc", bound=0.01, num_samples=500, data_digest="0" * 64)


@pytest.fixture(scope="module")
def manifest(toy_bundle: Path) -> Manifest:
    return open_bundle(toy_bundle).manifest


@pytest.fixture(scope="module")
def calibration(manifest: Manifest) -> Calibration:
    points = (
        OperatingPoint(
            name="c40", policy=ConfidenceSpec(threshold=0.6), compute=0.4, accuracy=0.9, exit_rates=(0.5, 0.3, 0.2),
            certificates=(certificate("accuracy", 0.88), certificate("consistency", 0.1)),
        ),
        OperatingPoint(
            name="c80", policy=ConfidenceSpec(threshold=0.9), compute=0.8, accuracy=0.95, exit_rates=(0.2, 0.3, 0.5),
            certificates=(certificate("accuracy", 0.93), certificate("consistency", 0.02)),
        ),
        OperatingPoint(
            name="e60", policy=EntropySpec(threshold=0.3), compute=0.6, accuracy=0.92, exit_rates=(0.4, 0.2, 0.4),
            certificates=(CRC,),
        ),
    )  # fmt: skip
    return Calibration(model_digest=manifest.model_digest, temperatures=(1.0,) * 3, operating_points=points)


@pytest.fixture(scope="module")
def read(manifest: Manifest, calibration: Calibration) -> Any:
    def give(limits: NoLimits | None = None, **fields: Any) -> Routing:
        return read_routing(fields, manifest, calibration, limits or NoLimits())

    return give


def test_nothing_given_means_the_models_default_policy_and_no_caps(read: Any, manifest: Manifest) -> None:
    routing = read()
    options = routing.options
    assert options.policy_spec == manifest.default_policy
    assert (options.latency_ms, options.min_exit, options.max_exit) == (None, 0, None)
    assert (options.combine, options.on_miss, options.explain, routing.top_k) == ("last", "answer", False, 5)


def test_a_policy_is_a_name_with_parameters_beside_it_or_an_object(read: Any) -> None:
    assert read(policy="entropy", threshold=0.3).options.policy_spec == EntropySpec(threshold=0.3)
    assert read(policy={"kind": "entropy", "threshold": [0.3, 0.2]}).options.policy_spec == EntropySpec(
        threshold=(0.3, 0.2)
    )
    assert read(policy="patience", patience=2).options.policy_spec == PatienceSpec(patience=2)
    assert read(threshold=0.7).options.policy_spec == ConfidenceSpec(threshold=0.7)


def test_a_budget_takes_the_calibrated_operating_point_that_meets_it(read: Any) -> None:
    cheap = read(compute=0.5)
    assert (cheap.options.operating_point, cheap.certificate) == ("c40", None)
    accurate = read(accuracy=0.9)
    assert (accurate.options.operating_point, accurate.certificate.bound) == ("c80", 0.93)
    faithful = read(risk={"epsilon": 0.05, "delta": 0.05})
    assert (faithful.options.operating_point, faithful.certificate.kind) == ("c80", "consistency")


def test_a_risk_may_be_kept_on_average_and_may_count_only_what_depth_would_have_got_right(read: Any) -> None:
    routing = read(risk={"epsilon": 0.02, "kind": "accuracy_loss"})
    assert (routing.options.operating_point, routing.certificate) == ("e60", CRC)


def test_a_new_calibration_of_the_same_model_is_asked_anew(manifest: Manifest, calibration: Calibration) -> None:
    swapped = tuple(
        point.model_copy(update={"compute": compute})
        for point, compute in zip(calibration.operating_points, (0.8, 0.4, 0.6), strict=True)
    )
    anew = calibration.model_copy(update={"operating_points": swapped})
    for known, chosen in ((calibration, "c40"), (anew, "c80"), (calibration, "c40")):
        assert read_routing({"compute": 0.5}, manifest, known, NoLimits()).options.operating_point == chosen


def test_a_kind_beside_a_budget_says_among_which_points_to_choose(read: Any) -> None:
    assert read(compute=0.7).options.operating_point == "e60"
    assert read(compute=0.7, policy="confidence").options.operating_point == "c40"
    with pytest.raises(InvalidValue, match="compute: this model has no operating point calibrated"):
        read(compute=0.7, policy="margin")


def test_a_compute_budget_beside_a_certified_one_refuses_what_costs_more(read: Any) -> None:
    assert read(accuracy=0.9, compute=0.8).options.operating_point == "c80"
    with pytest.raises(InvalidValue, match=r"compute: the cheapest operating point certified for this takes 0\.8"):
        read(accuracy=0.9, compute=0.7)


def test_an_operating_point_can_be_named(read: Any) -> None:
    options = read(operating_point="e60").options
    assert (options.operating_point, options.policy_spec) == ("e60", EntropySpec(threshold=0.3))
    with pytest.raises(InvalidValue, match="operating_point: this model has no point of that name; it has 3, such as"):
        read(operating_point="c50")
    with pytest.raises(InvalidValue, match="operating_point: policy and operating_point each choose"):
        read(operating_point="e60", policy="entropy")


def test_what_a_request_leaves_open_the_operators_default_point_decides(
    manifest: Manifest, calibration: Calibration
) -> None:
    def options(**fields: Any) -> Any:
        return read_routing(fields, manifest, calibration, NoLimits(), otherwise={"compute": 0.5}).options

    assert options().operating_point == "c40"
    assert options(latency_ms=5, min_exit=1).operating_point == "c40"
    assert options(accuracy=0.9).operating_point == "c80"
    assert options(policy="entropy").operating_point is None
    assert options(threshold=0.99).policy_spec == ConfidenceSpec(threshold=0.99)


@pytest.mark.parametrize(
    ("text", "defaults"),
    [
        ("compute=0.4", {None: {"compute": 0.4}}),
        ("confidence-40.2", {None: {"operating_point": "confidence-40.2"}}),
        (
            "digits:accuracy=0.9, scenes:c40,compute=1",
            {"digits": {"accuracy": 0.9}, "scenes": {"operating_point": "c40"}, None: {"compute": 1.0}},
        ),
    ],
)
def test_default_operating_points_are_read_per_model(text: str, defaults: Any) -> None:
    assert parse_defaults(text) == defaults


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "neither a point's name nor"),
        (":c40", "neither"),
        ("digits:", "neither"),
        ("speed=3", "neither"),
        ("compute=2", "compute: must be a number above 0 and at most 1"),
        ("compute=", "compute: must be a number"),
        ("c40,c50", "every model has two default operating points"),
        ("digits:c40,digits:c50", "digits has two"),
    ],
)
def test_a_default_operating_point_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_defaults(text)


def test_a_budget_that_no_operating_point_reaches_names_the_best_that_is(read: Any) -> None:
    with pytest.raises(InvalidValue, match=r"accuracy: .*best reachable is 0\.93"):
        read(accuracy=0.99)
    with pytest.raises(InvalidValue, match=r"compute: .*0\.4"):
        read(compute=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": {"kind": "entropy"}, "compute": 0.5}, "compute: policy and compute each choose the thresholds"),
        ({"policy": "entropy", "threshold": 0.1, "compute": 0.5}, "compute: policy and compute each choose"),
        ({"policy": "nonsense", "compute": 0.5}, "policy: the kind must be one of"),
        ({"threshold": 0.5, "accuracy": 0.9}, "accuracy: threshold and accuracy"),
        ({"risk": {"epsilon": 0.1}, "accuracy": 0.9}, "risk: accuracy and risk"),
        ({"operating_point": 3}, "operating_point: this model has no point"),
        ({"policy": "nonsense"}, "policy: the kind must be one of confidence"),
        ({"policy": 3}, "policy: must be an object or one of"),
        ({"policy": ["entropy"]}, "policy: must be an object or one of"),
        ({"policy": {"kind": "entropy"}, "threshold": 0.2}, "threshold: write it inside policy"),
        ({"policy": "confidence", "threshold": 1.5}, "threshold"),
        ({"policy": "confidence", "threshold": -0.1}, "threshold"),
        ({"policy": "confidence", "threshold": "0.9"}, "threshold: must be a number"),
        ({"policy": "confidence", "threshold": True}, "threshold"),
        ({"policy": "confidence", "threshold": [0.9, 2]}, r"threshold\.1: input should be less than or equal to 1"),
        ({"policy": "confidence", "threshold": [0.9]}, "threshold: a list holds one number per non-final exit, 2"),
        ({"policy": "confidence", "threshold": {}}, "threshold"),
        ({"policy": "patience", "threshold": 0.5}, "policy 'patience' has no such parameter"),
        ({"policy": "patience", "patience": 0}, "patience"),
        ({"policy": "fixed"}, "exit"),
        ({"policy": {"kind": "fixed", "exit": 3}}, "exit: must be 0 to 2"),
        ({"policy": {"kind": "window", "low": 0.9, "high": 0.1}}, "low must not be above high"),
        ({"latency_ms": -5}, "latency_ms: must be a number above 0"),
        ({"latency_ms": 0}, "latency_ms: must be a number above 0"),
        ({"latency_ms": "fast"}, "latency_ms: must be a number"),
        ({"latency_ms": True}, "latency_ms: must be a number"),
        ({"latency_ms": math.nan}, "latency_ms: must be a number"),
        ({"latency_ms": math.inf}, "latency_ms: must be a number"),
        ({"compute": 0}, "compute: must be a number above 0 and at most 1"),
        ({"compute": 1.5}, "compute: must be a number"),
        ({"accuracy": 2}, "accuracy: must be a number at least 0 and at most 1"),
        ({"risk": 0.1}, "risk: must be an object"),
        ({"risk": {"epsilon": 2, "delta": 0.1}}, r"risk\.epsilon: must be"),
        ({"risk": {"epsilon": 0.1, "delta": 1}}, r"risk\.delta: must be a number above 0 and below 1"),
        ({"risk": {"epsilon": 0.1, "kind": "speed"}}, r"risk\.kind: must be one of consistency, accuracy_loss"),
        ({"risk": {"delta": 0.1}}, "risk: must be an object"),
        ({"min_exit": 3}, "min_exit: must be an integer from 0 to 2"),
        ({"min_exit": 1.0}, "min_exit: must be an integer"),
        ({"max_exit": -1}, "max_exit: must be an integer from 0 to 2"),
        ({"min_exit": 2, "max_exit": 1}, "min_exit: 2 is above max_exit, 1"),
        ({"gate_threshold": 0.5}, "gate_threshold: this model has no gates"),
        ({"gates": "open"}, "gates: this model has no gates"),
        ({"combine": "sum"}, "combine: must be one of last, mean, geometric"),
        ({"on_miss": ["answer"]}, "on_miss: must be one of answer, reject"),
        ({"top_k": 0}, "top_k: must be an integer from 1 to 5"),
        ({"explain": 1}, "explain: must be true or false"),
        ({"treshold": 0.5}, "treshold: there is no such field; the fields are policy, threshold"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_a_sentence_that_names_the_field(
    fields: dict[str, Any], message: str, read: Any
) -> None:
    with pytest.raises(InvalidValue, match=message) as caught:
        read(**fields)
    assert caught.value.field is not None


def test_the_operators_limits_bound_depth_and_budget(read: Any) -> None:
    limits = NoLimits(max_latency_ms=100.0, depth_floor=1, depth_cap=1)
    assert (read(limits).options.min_exit, read(limits).options.max_exit) == (1, 1)
    assert read(limits, min_exit=0).options.min_exit == 1
    with pytest.raises(InvalidValue, match="max_exit: must be an integer from 1 to 1"):
        read(limits, max_exit=2)
    with pytest.raises(InvalidValue, match=r"latency_ms: .* at most 100"):
        read(limits, latency_ms=101)


def test_fields_written_as_text_are_read_as_what_they_hold() -> None:
    written = {
        "policy": "confidence", "threshold": "0.9, 0.8", "latency_ms": "20", "explain": "true", "max_exit": "1",
        "combine": "mean", "risk": '{"epsilon": 0.1, "delta": 0.05}',
    }  # fmt: skip
    assert fields_of_text(written) == {
        "policy": "confidence", "threshold": [0.9, 0.8], "latency_ms": 20, "explain": True, "max_exit": 1,
        "combine": "mean", "risk": {"epsilon": 0.1, "delta": 0.05},
    }  # fmt: skip
    assert fields_of_text({"policy": '{"kind": "entropy"}'}) == {"policy": {"kind": "entropy"}}


def test_text_that_is_not_what_the_field_holds_is_refused_by_the_field(read: Any) -> None:
    for name, text in (("latency_ms", "NaN"), ("latency_ms", "soon"), ("max_exit", "1e3"), ("explain", "yes")):
        with pytest.raises(InvalidValue, match=f"{name}: must be"):
            read(**fields_of_text({name: text}))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["confidence", "fixed", "all_of", "mean"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["kind", "threshold", "of", "exit", "epsilon", "delta", "low"]), inner)
    ),
    max_leaves=8,
)


TEXTS = st.text(max_size=12) | st.sampled_from(
    ["0.9,0.8", "[0.9]", "{}", '{"kind": "entropy"}', "1e999", "null", "true"]
)


def outcome_of(call: Callable[[], Routing]) -> Routing | OfframpError:
    try:
        return call()
    except OfframpError as error:
        return error


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_values_are_honoured_or_refused_by_name(read: Any, fields: dict[str, Any]) -> None:
    outcome = outcome_of(lambda: read(**fields))
    if isinstance(outcome, Routing):
        options = outcome.options
        assert 0 <= options.min_exit <= (2 if options.max_exit is None else options.max_exit)
    else:
        assert isinstance(outcome, InvalidValue)
        assert outcome.field


@given(st.dictionaries(st.sampled_from([*FIELDS, "unknown"]), TEXTS, max_size=3))
@settings(max_examples=300, deadline=None)
def test_any_text_is_honoured_or_refused_by_name(read: Any, written: dict[str, str]) -> None:
    outcome = outcome_of(lambda: read(**fields_of_text(written)))
    assert isinstance(outcome, Routing) or (isinstance(outcome, RequestError) and outcome.field)


def test_equal_policies_share_one_compiled_object(read: Any) -> None:
    first, second = read(policy="confidence", threshold=0.8), read(policy="confidence", threshold=0.8)
    assert first.options.policy is second.options.policy
    assert np.all(first.options.policy.threshold_RN == 0.8)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"combine": "mean"}, "combine: the exits of this model have different numbers of classes"),
        ({"combine": "geometric"}, "combine: the exits of this model have different numbers of classes"),
        ({"policy": "patience"}, "policy: patience and agreement compare labels"),
        (
            {"policy": {"kind": "any_of", "of": [{"kind": "confidence"}, {"kind": "agreement"}]}},
            "policy: patience and agreement compare",
        ),
    ],
)
def test_exits_of_different_width_are_not_compared(
    manifest: Manifest, calibration: Calibration, fields: dict[str, Any], sentence: str
) -> None:
    first, *others = manifest.exits
    coarse = manifest.model_copy(
        update={"exits": (first.model_copy(update={"num_classes": 2}), *others), "labels": None}
    )

    with pytest.raises(InvalidValue, match=sentence):
        read_routing(fields, coarse, calibration, NoLimits())
    assert read_routing({"policy": "confidence", "combine": "last"}, coarse, calibration, NoLimits())
