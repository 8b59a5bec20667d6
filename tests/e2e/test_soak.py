"""A short soak: a real server under load, with clients that leave and requests that no server should accept."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

SOAK = Path(__file__).parents[2] / "loadtest/benchmarks/soak.py"


def test_a_short_soak_gives_one_answer_each_and_counts_that_add_up(trained, tmp_path):
    data, out = tmp_path / "digits.npz", tmp_path / "soak.json"
    np.savez(data, x=trained.data.inputs(trained.data.test), y=trained.data.test.labels_N)
    done = subprocess.run(
        [
            sys.executable, SOAK, trained.bundle, "--data", data, "--minutes", "0.1", "--rho", "0.3",
            "--leave-share", "0.1", "--bad-share", "0.1", "--serve", "--warm-up-s 0.3", "--out", out,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(out.read_text())
    client, server = written["counted"]["client"], written["counted"]["server"]
    assert client["ok"] > 0
    assert client["left"] > 0
    assert client["invalid"] == server["invalid"] > 0
    assert all(verdict["is_good"] for verdict in written["verdicts"])
    assert len(written["memory_bytes"]) >= 3
