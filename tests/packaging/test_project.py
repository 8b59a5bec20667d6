"""What the project's files promise a person who installs it."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
    "packages"
]
TARGETS = (
    "demo",
    "serve",
    "test",
    "test-system",
    "test-slow",
    "lint",
    "format",
    "bench",
    "bench-budgets",
    "bench-stages",
    "bench-full-depth",
    "bench-request-path",
    "bench-memory",
    "bench-goodput",
    "bench-soak",
    "dashboards",
    "clean",
    "help",
)


def requirements(lines):
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def test_torch_is_a_range_for_people_and_one_version_for_us():
    torch = requirements(EXTRAS["export"])["torch"]
    operators = {clause.operator for clause in torch.specifier}
    assert {">=", "<"} <= operators
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    (pin,) = (line for line in lines if Requirement(line).name == "torch")
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+", pin)
    assert torch.specifier.contains(pin.removeprefix("torch=="))


def test_the_servers_install_has_no_torch_and_no_onnxruntime_of_its_own():
    assert not requirements(PROJECT["dependencies"]).keys() & {"torch", "onnxscript", "onnxruntime", "onnxruntime-gpu"}


def test_cpu_and_gpu_are_the_same_module_from_two_packages_and_no_other_extra_brings_either():
    assert requirements(EXTRAS["cpu"]).keys() == {"onnxruntime"}
    assert requirements(EXTRAS["gpu"]).keys() == {"onnxruntime-gpu"}
    for extra in EXTRAS.keys() - {"cpu", "gpu"}:
        assert not requirements(EXTRAS[extra]).keys() & {"onnxruntime", "onnxruntime-gpu"}


def test_every_dependency_of_the_server_says_which_version_it_needs_at_least():
    for requirement in requirements(PROJECT["dependencies"] + EXTRAS["cpu"] + EXTRAS["gpu"]).values():
        assert ">=" in str(requirement.specifier), requirement


def test_the_dashboards_library_is_for_the_grafana_that_is_started():
    sdk = requirements(EXTRAS["dashboards"])["grafana-foundation-sdk"]
    (pin,) = sdk.specifier
    assert pin.operator == "=="
    image = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["grafana"]["image"]
    made_for = pin.version.split("!")[1].split(".")[:2]
    assert image.split(":")[1].split(".")[:2] == made_for


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", tmp_path_factory.mktemp("wheel"))


def build(kind, folder):
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.iterdir()
    return built


def test_the_wheel_holds_every_package_whole_and_typed(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in map(Path, PACKAGES):
        assert f"{package.name}/py.typed" in names
        for source in (*(ROOT / package).rglob("*.py"), *(ROOT / package).rglob("*.j2")):
            assert str(source.relative_to((ROOT / package).parent)) in names


def test_the_wheel_overwrites_nobody_elses_package(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    ours = {Path(package).name for package in PACKAGES}
    assert tops == ours | {f"offramp-{PROJECT['version']}.dist-info"}
    assert all(name.startswith("offramp_") for name in ours)


def test_the_wheel_brings_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        entry_points = archive.read(f"offramp-{PROJECT['version']}.dist-info/entry_points.txt").decode()
    assert "offramp = offramp_cli.__main__:main" in entry_points


def test_the_source_distribution_is_enough_to_install_and_to_test(tmp_path):
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "Makefile",
        "tests/conftest.py",
        "dashboards/offramp.json",
    }
    assert wanted <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".venv", ".demo", ".git/"))]


def make(*arguments):
    # Started from `make test`, this make would take itself for a part of that one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_make_knows_its_targets(target):
    assert make("--dry-run", target).returncode == 0


def test_make_alone_says_what_there_is():
    said = make().stdout
    assert [line.split()[1] for line in said.splitlines()] == sorted(TARGETS, key=said.index)


def test_every_set_up_installs_under_the_constraints_and_pulls_in_one_backend():
    commands = make("--dry-run", "--always-make", "lint").stdout
    installs = [line for line in commands.splitlines() if " pip " in line and " install " in line]
    assert len(installs) == 4
    assert all("--constraint constraints.txt" in install for install in installs)
    assert all("cpu" in install and "gpu" not in install for install in installs)


def test_an_old_python_is_refused_with_a_sentence(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make(f"PYTHON={old}", f"VENV={tmp_path / 'venv'}", "demo")
    assert done.returncode != 0
    assert "Offramp needs Python 3.11 or newer; name one: make PYTHON=python3.12 demo" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_runs_what_people_run():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert re.findall(r"^make (\S+)$", text, re.MULTILINE) == ["lint", "test", "test-system"]
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
