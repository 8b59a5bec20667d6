import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_contract.calibration import (
    CALIBRATION_FILE,
    Calibration,
    Certificate,
    OperatingPoint,
    read_calibration,
)
from offramp_contract.errors import DigestMismatch, InvalidValue, ManifestError, UnsupportedFormat
from offramp_contract.files import FolderFiles
from offramp_contract.manifest import Manifest
from offramp_contract.policy_spec import ConfidenceSpec, FixedSpec
from pydantic import ValidationError

DIGEST = "a" * 64
tenths = st.integers(1, 10).map(lambda tenth: tenth / 10)
certificates = st.builds(
    Certificate,
    kind=st.sampled_from(["consistency", "accuracy"]),
    method=st.sampled_from(["ltt", "crc"]),
    bound=tenths,
    delta=st.sampled_from([0.05, 0.1]),
    num_samples=st.just(500),
    data_digest=st.just(DIGEST),
)
points = st.builds(
    OperatingPoint,
    name=st.sampled_from("abcdefgh"),
    policy=st.builds(ConfidenceSpec, threshold=tenths),
    compute=tenths,
    accuracy=tenths,
    certificates=st.lists(certificates, max_size=3).map(tuple),
)
calibrations = st.builds(
    Calibration,
    model_digest=st.just(DIGEST),
    temperatures=st.just((1.0, 2.0)),
    operating_points=st.lists(points, max_size=6).map(tuple),
)


def point(name: str, compute: float, accuracy: float, *held: Certificate) -> OperatingPoint:
    return OperatingPoint(
        name=name, policy=ConfidenceSpec(threshold=0.5), compute=compute, accuracy=accuracy, certificates=held
    )


def certificate(kind: str, bound: float, delta: float = 0.05) -> Certificate:
    return Certificate.model_validate(
        {"kind": kind, "method": "ltt", "bound": bound, "delta": delta, "num_samples": 9, "data_digest": DIGEST}
    )


def calibrated(*held: OperatingPoint) -> Calibration:
    return Calibration(model_digest=DIGEST, temperatures=(1.0,), operating_points=held)


@pytest.fixture
def manifest(written: dict[str, Any]) -> Manifest:
    return Manifest.model_validate(written)


@pytest.fixture
def good(manifest: Manifest) -> dict[str, Any]:
    """A calibration of that manifest, as JSON."""
    held = (point("fast", 0.25, 0.875, certificate("accuracy", 0.75)),)
    calibration = Calibration(model_digest=manifest.model_digest, temperatures=(1.5, 0.5), operating_points=held)
    read: dict[str, Any] = json.loads(calibration.to_bytes())
    return read


def read(folder: Path, written: object, manifest: Manifest) -> Calibration:
    (folder / CALIBRATION_FILE).write_text(json.dumps(written))
    return read_calibration(FolderFiles(folder), manifest)


def test_a_bundle_without_calibration_has_temperatures_of_one_and_no_operating_points(
    tmp_path: Path, manifest: Manifest
) -> None:
    bare = read_calibration(FolderFiles(tmp_path), manifest)
    assert bare == Calibration.bare(manifest)
    assert bare.temperatures == (1.0, 1.0)
    assert bare.operating_points == ()
    assert bare.model_digest == manifest.model_digest


@given(calibrations)
def test_a_calibration_survives_being_written_and_read(calibration: Calibration) -> None:
    again = Calibration.model_validate(json.loads(calibration.to_bytes()))
    assert again == calibration
    assert again.calibration_digest == calibration.calibration_digest
    assert calibration.calibration_digest == hashlib.sha256(calibration.to_bytes()).hexdigest()


def test_its_digest_changes_with_what_it_says() -> None:
    variants = [
        calibrated(),
        Calibration(model_digest=DIGEST, temperatures=(1.25,)),
        Calibration(model_digest="b" * 64, temperatures=(1.0,)),
        calibrated(point("a", 0.5, 0.5)),
        calibrated(point("a", 0.5, 0.75)),
    ]
    assert len({variant.calibration_digest for variant in variants}) == len(variants)


def test_a_calibration_made_for_another_model_is_refused(
    tmp_path: Path, manifest: Manifest, good: dict[str, Any]
) -> None:
    assert read(tmp_path, good, manifest).temperatures == (1.5, 0.5)
    with pytest.raises(DigestMismatch, match="made for another model"):
        read(tmp_path, good | {"model_digest": "b" * 64}, manifest)


@pytest.mark.parametrize("version", [2, None, "1"])
def test_a_calibration_from_the_future_is_refused_by_name(
    tmp_path: Path, manifest: Manifest, good: dict[str, Any], version: object
) -> None:
    with pytest.raises(UnsupportedFormat, match="calibration format"):
        read(tmp_path, good | {"format_version": version, "new": 1}, manifest)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"temperatures": [1.0]}, "2 exits need as many temperatures"),
        ({"temperatures": [1.0, 0.0]}, r"temperatures\.1"),
        ({"temperatures": [1.0, -1.0]}, r"temperatures\.1"),
        ({"temperatures": [1.0, float("nan")]}, r"temperatures\.1"),
        ({"temperatures": [float("inf"), 1.0]}, r"temperatures\.0"),
        ({"surprise": 1}, "surprise"),
        ({"model_digest": "short"}, "model_digest"),
        ({"operating_points": [{"name": "a b"}]}, r"operating_points\.0\.name"),
    ],
)
def test_an_invalid_calibration_is_refused_by_name(
    tmp_path: Path, manifest: Manifest, good: dict[str, Any], change: dict[str, Any], says: str
) -> None:
    with pytest.raises(ManifestError, match=says) as refused:
        read(tmp_path, good | change, manifest)
    assert refused.value.message.startswith("calibration.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"compute": 0.0}, "compute"),
        ({"compute": 1.5}, "compute"),
        ({"compute": float("nan")}, "compute"),
        ({"accuracy": float("nan")}, "accuracy"),
        ({"policy": {"kind": "fixed", "exit": 2}}, "exit: must be 0 to 1"),
        ({"policy": {"kind": "confidence", "threshold": [0.5, 0.5]}}, "one number per non-final exit"),
        ({"policy": {"kind": "nonsense"}}, "policy"),
    ],
)
def test_an_operating_point_that_does_not_fit_the_model_is_refused(
    tmp_path: Path, manifest: Manifest, good: dict[str, Any], change: dict[str, Any], says: str
) -> None:
    good["operating_points"][0] |= change
    with pytest.raises(ManifestError, match=says):
        read(tmp_path, good, manifest)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"[" * 100_000, b"\xff"])
def test_what_is_no_calibration_at_all_is_refused(tmp_path: Path, manifest: Manifest, text: bytes) -> None:
    (tmp_path / CALIBRATION_FILE).write_bytes(text)
    with pytest.raises(ManifestError, match=r"calibration\.json is not"):
        read_calibration(FolderFiles(tmp_path), manifest)


@given(calibrations, tenths)
def test_a_compute_budget_gets_the_most_accurate_point_within_it_and_the_cheapest_of_equals(
    calibration: Calibration, compute: float
) -> None:
    within = [p for p in calibration.operating_points if p.compute <= compute]
    if not within:
        with pytest.raises(InvalidValue):
            calibration.within_compute(compute)
        return
    chosen = calibration.within_compute(compute)
    assert chosen in within
    assert all(other.accuracy <= chosen.accuracy for other in within)
    assert all(other.compute >= chosen.compute for other in within if other.accuracy == chosen.accuracy)


@given(calibrations, tenths, tenths)
def test_more_compute_never_buys_less_accuracy(calibration: Calibration, one: float, other: float) -> None:
    small, large = sorted((one, other))
    if any(p.compute <= small for p in calibration.operating_points):
        assert calibration.within_compute(small).accuracy <= calibration.within_compute(large).accuracy


@given(calibrations, tenths)
def test_an_accuracy_gets_the_cheapest_point_that_is_certified_for_it(
    calibration: Calibration, accuracy: float
) -> None:
    certified = [
        p
        for p in calibration.operating_points
        if any(c.kind == "accuracy" and c.bound >= accuracy for c in p.certificates)
    ]
    if not certified:
        with pytest.raises(InvalidValue):
            calibration.certified_accuracy(accuracy)
        return
    chosen = calibration.certified_accuracy(accuracy)
    assert chosen in certified
    assert chosen.compute == min(p.compute for p in certified)


@given(calibrations, tenths, st.sampled_from([0.01, 0.05, 0.1]))
def test_a_risk_gets_the_cheapest_point_whose_one_certificate_holds_both_its_numbers(
    calibration: Calibration, epsilon: float, delta: float
) -> None:
    certified = [
        p
        for p in calibration.operating_points
        if any(c.kind == "consistency" and c.bound <= epsilon and c.delta <= delta for c in p.certificates)
    ]
    if not certified:
        with pytest.raises(InvalidValue):
            calibration.certified_risk(epsilon, delta)
        return
    chosen = calibration.certified_risk(epsilon, delta)
    assert chosen in certified
    assert chosen.compute == min(p.compute for p in certified)


def test_of_equally_accurate_points_the_cheapest_is_chosen_wherever_it_stands() -> None:
    cheap, dear = point("cheap", 0.25, 0.75), point("dear", 0.5, 0.75)
    assert calibrated(cheap, dear).within_compute(0.5) == calibrated(dear, cheap).within_compute(0.5) == cheap


def test_expected_accuracy_is_no_certificate() -> None:
    lucky, certified = point("lucky", 0.1, 0.99), point("sure", 0.9, 0.95, certificate("accuracy", 0.9))
    assert calibrated(lucky, certified).certified_accuracy(0.9) == certified


def test_two_certificates_that_each_hold_half_hold_nothing() -> None:
    weak = point("a", 0.5, 0.5, certificate("consistency", 0.01, 0.2), certificate("consistency", 0.2, 0.01))
    with pytest.raises(InvalidValue, match=r"best reachable is 0\.2"):
        calibrated(weak).certified_risk(0.05, 0.05)


@pytest.mark.parametrize(
    ("choose", "field", "best"),
    [
        (lambda calibration: calibration.within_compute(0.1), "compute", "0.25"),
        (lambda calibration: calibration.certified_accuracy(0.99), "accuracy", "0.875"),
        (lambda calibration: calibration.certified_risk(0.001, 0.05), "risk", "0.02"),
    ],
)
def test_what_cannot_be_reached_is_refused_naming_the_best_that_can(choose: Any, field: str, best: str) -> None:
    calibration = calibrated(
        point("a", 0.25, 0.8, certificate("accuracy", 0.75)),
        point("b", 0.5, 0.9, certificate("accuracy", 0.875), certificate("consistency", 0.02)),
        point("c", 0.75, 0.95, certificate("consistency", 0.04)),
    )
    with pytest.raises(InvalidValue) as refused:
        choose(calibration)
    assert refused.value.field == field
    assert refused.value.message.startswith(f"{field}: ")
    assert refused.value.message.endswith(f"the best reachable is {best}")
    with pytest.raises(InvalidValue, match=f"{field}: this model has no operating point calibrated for it"):
        choose(calibrated())


def test_a_calibration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        calibrated().temperatures = (2.0,)  # type: ignore[misc]


def test_an_operating_point_may_hold_any_policy() -> None:
    fixed = OperatingPoint(name="static", policy=FixedSpec(exit=0), compute=0.5, accuracy=0.5)
    assert calibrated(fixed).within_compute(1.0).policy == FixedSpec(exit=0)
