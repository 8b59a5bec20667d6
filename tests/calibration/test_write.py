import os
from pathlib import Path

import pytest
from offramp_calibration import write as write_module
from offramp_calibration.write import write_bundle, write_calibration
from offramp_contract.calibration import Calibration
from offramp_contract.errors import CalibrationError
from offramp_runtime import open_bundle


@pytest.fixture
def bundle(make_bundle):
    return make_bundle(labels=("a", "b", "c", "d"))


def calibrated(bundle: Path, temperature: float) -> Calibration:
    return Calibration(model_digest=open_bundle(bundle).manifest.model_digest, temperatures=(temperature,) * 3)


def test_a_calibration_replaces_the_one_that_was_there(bundle):
    files = sorted(bundle.rglob("*"))
    for temperature in (2.0, 3.0):
        path = write_calibration(calibrated(bundle, temperature), bundle)
        assert open_bundle(bundle).calibration == calibrated(bundle, temperature)
    assert sorted(bundle.rglob("*")) == sorted([*files, path])


def test_a_calibration_that_cannot_be_put_in_place_leaves_the_old_one(bundle, monkeypatch):
    write_calibration(calibrated(bundle, 2.0), bundle)

    def fail(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(bundle.rglob("*"))
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_calibration(calibrated(bundle, 3.0), bundle)
    assert open_bundle(bundle).calibration == calibrated(bundle, 2.0)
    assert sorted(bundle.rglob("*")) == before


def test_a_calibration_that_no_reader_would_accept_is_not_written(bundle, monkeypatch):
    monkeypatch.setattr(write_module, "MAX_CALIBRATION_BYTES", 10)
    with pytest.raises(CalibrationError, match=r"calibration\.json would be .* bytes, over 10"):
        write_calibration(calibrated(bundle, 2.0), bundle)
    assert open_bundle(bundle).calibration.temperatures == (1.0, 1.0, 1.0)


def test_a_copy_of_a_bundle_is_the_same_model_with_the_new_calibration(bundle, tmp_path):
    write_calibration(calibrated(bundle, 2.0), bundle)
    original = open_bundle(bundle)
    write_bundle(original, calibrated(bundle, 3.0), tmp_path / "new" / "copy")
    copy = open_bundle(tmp_path / "new" / "copy")
    assert copy.manifest == original.manifest
    assert copy.graphs == original.graphs
    assert copy.calibration == calibrated(bundle, 3.0)
    assert open_bundle(bundle).calibration == calibrated(bundle, 2.0)
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["copy"]
