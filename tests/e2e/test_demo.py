"""`offramp demo`, as `make demo` runs it, only smaller."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import httpx
import pytest
from offramp_cli.digits import Recipe, is_made_by
from offramp_runtime import open_bundle

COLUMNS = ("policy", "budget", "accuracy", "average depth", "compute saved", "p50 ms", "p99 ms", "exits, %", "forced")
SMALL = ("--epochs", "2", "--images", "60", "--rate", "100", "--threads", "1")


def demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "offramp_cli", "demo", "--out", str(folder), *arguments]
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "OFFRAMP_WARM_UP_S": "0.3"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def first(folder):
    done = demo(folder, *SMALL, "--figure", str(folder / "figure.svg"))
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def second(folder, first):
    done = demo(folder, *SMALL)
    assert done.returncode == 0, done.stderr
    return done


def rows_of(table: str) -> list[str]:
    return [
        line
        for line in table.splitlines()
        if re.match(r"(full depth|first exit|confidence|entropy|patience|compute ≤)", line)
    ]


def test_the_table_has_its_columns_and_fits_a_terminal(first):
    lines = first.stdout.splitlines()
    heading = " ".join(lines[lines.index(next(line for line in lines if line.startswith("policy"))) - 1 :][:2])
    words = set(heading.replace(",", "").split())
    assert {word for column in COLUMNS for word in column.replace(",", "").split()} <= words
    assert all(len(row) <= 100 for row in rows_of(first.stdout))


def test_the_table_shows_policies_and_budgets(first):
    rows = rows_of(first.stdout)
    assert len(rows) == 12
    assert sum(" ms " in row for row in rows) == 3
    full, first_exit = rows[0], rows[1]
    assert "···█ 0/0/0/100" in full
    assert "█··· 100/0/0/0" in first_exit
    assert re.search(r"100% +0%", full)


def test_the_bundle_is_calibrated_and_compute_budgets_are_kept(folder, first):
    calibration = open_bundle(folder / "digits").calibration
    assert calibration.num_samples == 400
    assert len(calibration.operating_points) > 20
    asked_and_taken = [re.search(r"compute ≤ ([\d.]+).*?% +(\d+)% +\d+%", row) for row in rows_of(first.stdout)[6:9]]
    for found in asked_and_taken:
        assert found is not None
        asked, taken = float(found[1]), int(found[2]) / 100
        assert 0 < taken <= asked + 0.1  # 60 images


def test_it_says_where_docs_and_metrics_are(first):
    assert re.search(r"docs +http://127\.0\.0\.1:\d+/docs", first.stdout)
    assert re.search(r"metrics +http://127\.0\.0\.1:\d+/metrics", first.stdout)


def test_the_server_has_stopped(first):
    port = int(re.findall(r"127\.0\.0\.1:(\d+)", first.stdout)[0])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_progress_is_shown_while_it_trains_and_measures(first):
    assert "training on digits" in first.stderr
    assert "measuring" in first.stderr


def test_the_bundle_stays_and_knows_how_it_was_made(folder, first):
    manifest = open_bundle(folder / "digits").manifest
    assert manifest.name == "digits"
    assert manifest.labels == tuple("0123456789")
    assert manifest.provenance.training["settings"]["epochs"] == 2


def test_the_figure_is_a_picture_that_names_its_machine_seed_and_command(folder, first):
    picture = (folder / "figure.svg").read_text()
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    for named in ("seed 0", "cores of", "offramp demo --figure", "100/s"):
        assert named in picture


def test_the_second_run_trains_nothing_and_serves_the_same_bundle(first, second):
    assert "training on digits" not in second.stderr
    assert "using the bundle" in second.stderr
    assert len(rows_of(second.stdout)) == 12


def test_a_bundle_is_used_again_only_if_it_is_sound_calibrated_and_made_by_the_same_recipe(folder, second, tmp_path):
    made = Recipe(epochs=2)
    assert is_made_by(made, folder / "digits")
    assert not is_made_by(Recipe(epochs=2, seed=1), folder / "digits")
    assert not is_made_by(Recipe(epochs=3), folder / "digits")
    assert not is_made_by(made, tmp_path)
    bundle = tmp_path / "digits"
    shutil.copytree(folder / "digits", bundle)
    (bundle / "calibration.json").unlink()
    assert not is_made_by(made, bundle)
    shutil.copy(folder / "digits" / "calibration.json", bundle)
    (bundle / "stages" / "01.onnx").write_bytes(b"")
    assert not is_made_by(made, bundle)


def test_keep_serving_serves_until_it_is_interrupted_and_then_leaves_nothing_running(folder, second):
    command = [sys.executable, "-m", "offramp_cli", "demo", "--out", str(folder), *SMALL, "--keep-serving"]
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "OFFRAMP_WARM_UP_S": "0.3", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as it:
        assert it.stdout is not None
        line = next(line for line in it.stdout if line.startswith("serving at "))
        url = line.split()[2]
        assert httpx.get(f"{url}/v2/health/ready", trust_env=False).status_code == 200
        it.send_signal(signal.SIGINT)
        assert it.wait(60) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/v2/health/ready", trust_env=False)


def test_a_demo_that_is_told_to_stop_takes_its_server_with_it(folder, second):
    command = [sys.executable, "-m", "offramp_cli", "demo", "--out", str(folder), *SMALL, "--rate", "1"]
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "OFFRAMP_WARM_UP_S": "0.3"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment) as it:
        assert it.stderr is not None
        line = next(line for line in it.stderr if " at http://" in line)
        it.send_signal(signal.SIGTERM)
        assert it.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(httpx.ConnectError):
        httpx.get(line.split()[-1], trust_env=False)


def test_another_recipe_makes_another_bundle_and_bundle_only_serves_nothing(folder, second):
    before = open_bundle(folder / "digits").manifest.model_digest
    done = demo(folder, "--epochs", "2", "--seed", "1", "--threads", "1", "--bundle-only")
    assert done.returncode == 0, done.stderr
    assert "training on digits" in done.stderr
    assert not rows_of(done.stdout)
    assert open_bundle(folder / "digits").manifest.model_digest != before
