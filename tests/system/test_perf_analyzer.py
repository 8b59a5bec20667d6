"""The unmodified `perf_analyzer`, as its wheel carries it, against a real server."""

import csv
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from offramp_cli.server_process import server_process

PERF_ANALYZER = Path(__file__).parents[2] / ".venv" / "perf-analyzer"
"""Where `make test-system` puts it, with the CUDA runtime library that it is linked against."""
SERVE_FLAGS = ("--device", "cpu", "--threads", "1", "--warm-up-s", "0.3")
LIMIT_S = 120.0
# A window ends after so many requests, and any three count as stable: the test is of the protocol, not of speed.
WINDOWS = ("--measurement-mode", "count_windows", "--measurement-request-count", "40", "-s", "100000")


@pytest.fixture(scope="module")
def address(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    bundle = make_bundle(name="digits", row_shape=(1, 8, 8), num_classes=10)
    with server_process(bundle, tmp_path_factory.mktemp("perf") / "server.log", SERVE_FLAGS) as url:
        yield url.removeprefix("http://")


@pytest.mark.system
@pytest.mark.parametrize(
    "load",
    [
        ("--concurrency-range", "1:2"),
        ("--concurrency-range", "2", "-b", "4", "-a"),
        ("--concurrency-range", "2", "--input-tensor-format", "json", "--output-tensor-format", "json"),
    ],
    ids=["one row", "batches, asynchronously", "json"],
)
def test_perf_analyzer_measures_a_served_model(address: str, load: tuple[str, ...], tmp_path: Path) -> None:
    report = tmp_path / "report.csv"
    binary = PERF_ANALYZER / "bin" / "perf_analyzer"
    libraries = PERF_ANALYZER / "nvidia" / "cuda_runtime" / "lib"
    ended = subprocess.run(
        [binary, "-m", "digits", "-u", address, "-i", "http", "-f", report, *WINDOWS, *load],
        env=os.environ | {"LD_LIBRARY_PATH": str(libraries)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = list(csv.DictReader(report.read_text().splitlines()))
    assert rows
    for row in rows:
        assert float(row["Inferences/Second"]) > 0
        assert float(row["Server Compute Infer"]) > 0  # so it found and understood the server's own statistics
