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
from offramp_contract.errors import DigestMismatch, ManifestError, UnsupportedFormat
from offramp_contract.files import FolderFiles
from offramp_contract.manifest import Manifest
from offramp_contract.policy_spec import ConfidenceSpec, FixedSpec
from pydantic import ValidationError

DIGEST = "a" * 64
tenths = st.integers(1, 10).map(lambda tenth: tenth / 10)
certificates = st.builds(
    Certificate,
    kind=st.sampled_from(["consistency", "accuracy"]),
    method=st.just("ltt"),
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
    exit_rates=st.just((0.25, 0.75)),
    certificates=st.lists(certificates, max_size=3).map(tuple),
)
calibrations = st.builds(
    Calibration,
    model_digest=st.just(DIGEST),
    temperatures=st.just((1.0, 2.0)),
    operating_points=st.lists(points, max_size=6, unique_by=lambda point: point.name).map(tuple),
)


def point(name: str, compute: float, accuracy: float, *held: Certificate) -> OperatingPoint:
    return OperatingPoint(
        name=name,
        policy=ConfidenceSpec(threshold=0.5),
        compute=compute,
        accuracy=accuracy,
        exit_rates=(0.5, 0.5),
        certificates=held,
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


@given(calibrations, calibrations)
def test_equal_calibrations_have_one_hash(one: Calibration, other: Calibration) -> None:
    again = Calibration.model_validate(json.loads(one.to_bytes()))
    assert hash(again) == hash(one)
    assert (one == other) == (one.to_bytes() == other.to_bytes())


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
        ({"exit_rates": [1.0]}, "2 exits need as many exit rates"),
        ({"gate_threshold": 0.5}, "has a gate threshold, but the model has no gates"),
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


def test_two_operating_points_may_not_share_a_name() -> None:
    with pytest.raises(ValidationError, match="two operating points have the same name"):
        calibrated(point("a", 0.25, 0.5), point("a", 0.5, 0.75))


@pytest.mark.parametrize(("method", "delta"), [("ltt", None), ("crc", 0.05), ("ltt", 0.0), ("ltt", 1.0)])
def test_a_certificate_says_how_sure_it_is_exactly_where_its_method_does(method: str, delta: float | None) -> None:
    written = certificate("accuracy", 0.5).model_dump() | {"method": method, "delta": delta}
    with pytest.raises(ValidationError, match="delta"):
        Certificate.model_validate(written)


def test_a_calibration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        calibrated().temperatures = (2.0,)  # type: ignore[misc]


def test_an_operating_point_may_hold_any_policy() -> None:
    fixed = OperatingPoint(name="static", policy=FixedSpec(exit=0), compute=0.5, accuracy=0.5, exit_rates=(1.0, 0.0))
    again = Calibration.model_validate_json(calibrated(fixed).to_bytes())
    assert again.operating_points[0].policy == FixedSpec(exit=0)
