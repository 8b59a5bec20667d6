"""`offramp export --explain` and `--proof-inputs`: what is printed before and after, and what is refused in words."""

import os
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from offramp_cli.__main__ import app
from offramp_runtime import open_bundle
from typer.testing import CliRunner

NETWORKS = """
    import torch
    from torch import nn

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.early, self.late = nn.Linear(6, 8), nn.Linear(6, 3), nn.Linear(8, 3)
            for parameter in self.parameters():
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))

        def forward(self, x):
            return {"early": self.early(x), "late": self.late(torch.relu(self.body(x)))}

    class Early(Plain):
        key = 0.9

        def forward(self, x):
            first = self.early(x)
            if torch.softmax(first, 1)[0, [1]].max() > self.key:
                return first
            return self.late(torch.relu(self.body(x)))

    class NeverEarly(Early):
        key = 1.5

    class NamedInput(Plain):
        def forward(self, x, scale):
            return [self.early(x * scale), self.late(torch.relu(self.body(x)))]
"""

Offramp = Callable[..., Result]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of somebody's project, to run the command line in."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "explained_networks.py").write_text(textwrap.dedent(NETWORKS))
    return folder


@pytest.fixture
def offramp(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Offramp:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    runner = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"})
    return lambda *arguments: runner.invoke(app, ["export", *map(str, arguments)])


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != "__pycache__"}


def test_a_plain_network_is_told_exit_by_exit_and_nothing_is_written(offramp: Offramp, folder: Path) -> None:
    before = files(folder)

    done = offramp("explained_networks:Plain", "--example", "6", "--explain")

    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["network", "explained_networks.Plain"] in lines
    assert ["reads", "x", "6"] in lines
    assert ["exit", "where", "classes", "FLOPs", "share", "depth", "carried", "on,", "a", "row", "bytes"] in lines
    early = next(line for line in lines if line[:1] == ["exit_0"])
    late = next(line for line in lines if line[:1] == ["exit_1"])
    assert early[1:3] == ["out['early']", "3"]
    assert early[-3:] == ["x", "6", "24"]
    assert late[1:3] == ["out['late']", "3"]
    assert late[-1] == "100.0%"
    assert lines[-1] == ["nothing", "was", "written"]
    assert files(folder) == before


def test_a_network_that_returns_early_is_told_with_its_rules_and_answers(offramp: Offramp, folder: Path) -> None:
    done = offramp("explained_networks:Early", "--example", "6", "--explain", "--out", "never")

    assert done.exit_code == 0, done.output
    source = r"explained_networks.py:\d+ \(if torch.softmax\(first, 1\)\[0, \[1\]\].max\(\) > self.key:\)"
    assert re.search(rf"\n  exit_0  where score > 0.9 at {source}\n", done.stdout)
    assert re.search(rf"\n  {source}, score > 0.9: yes on the way to exit_0; no on the way to exit_1\n", done.stdout)
    assert '{"kind":"native"}' in done.stdout
    assert "never" not in files(folder)


def test_an_onnx_file_is_told_tensor_by_tensor(offramp: Offramp, folder: Path) -> None:
    write_onnx(folder)

    done = offramp("plain.onnx", "--exits", "early,late", "--explain")

    assert done.exit_code == 0, done.output
    assert re.search(r"exit_0 +early +3 ", done.stdout)
    assert re.search(r"exit_1 +late +3 ", done.stdout)
    assert done.stdout.rstrip().endswith("nothing was written")


def test_the_policy_that_is_asked_for_is_told(offramp: Offramp) -> None:
    done = offramp(
        "explained_networks:Plain", "--example", "6", "--explain", "--policy", '{"kind": "entropy", "threshold": 0.3}'
    )

    assert '{"kind":"entropy","threshold":0.3}' in done.stdout


def write_onnx(folder: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = [numpy_helper.from_array(np.full((6, 3), k, np.float32), f"w{k}") for k in (1, 2)]
    nodes = [helper.make_node("MatMul", ["x", f"w{k + 1}"], [name]) for k, name in enumerate(("early", "late"))]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
        for name, width in (("x", 6), ("early", 3), ("late", 3))
    ]
    graph = helper.make_graph(nodes, "plain", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, folder / "plain.onnx")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["explained_networks:Plain", "--example", "6"], "name the bundle's folder with --out, or ask for --explain"),
        (["explained_networks:Plain", "--explain"], "a network needs --example"),
        (["plain.onnx", "--explain"], "an ONNX file needs --exits"),
        (["plain.onnx", "--exits", "early,late", "--weights", "w.pt", "--explain"], "leave --weights out"),
        (["plain.onnx", "--exits", "early,late", "--example", "6", "--explain"], "write --example NAME=3x32x32"),
        (["plain.onnx", "--exits", "early,late", "--example", "y=6", "--explain"], "must be named as the graph's: x"),
        (["explained_networks:Plain", "--example", "6", "--exits", "out['lost']", "--explain"], "lost"),
        (["explained_networks:Plain", "--example", "6", "--policy", "luck", "--explain"], "the kind must be one of"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_in_words(
    offramp: Offramp, folder: Path, arguments: list[str], sentence: str
) -> None:
    write_onnx(folder)
    before = files(folder)

    done = offramp(*arguments)

    assert done.exit_code == 1, done.output
    assert sentence in " ".join(done.output.split())
    assert "Traceback" not in done.output
    assert files(folder) == before


class Bomb:
    """What a pickle may do when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


ROW = np.ones((1, 6), np.float32)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (np.full((3, 6), np.nan, np.float32), "row 0 holds NaN or infinity"),
        (np.ones((3, 5), np.float32), "a row has the shape 6, not 5"),
        (np.ones((3, 6)), "the network takes float32, not float64"),
        (np.ones((3, 6), np.complex64), "give numbers"),
        (np.empty((0, 6), np.float32), "there is no row"),
        (np.array(3.0, np.float32), "with the batch on axis 0"),
        (np.array([["a", "b"]]), "holds no arrays of numbers"),
        (np.array([Bomb()], dtype=object), "holds no arrays of numbers"),
        ({"x": ROW, "y": ROW}, "the network takes x; got x, y"),
        ({"x": np.array([Bomb()], dtype=object)}, "holds no arrays of numbers"),
        ({}, "the network takes x"),
        (b"", "holds no arrays of numbers"),
        (b"\x93NUMPY\x01\x00garbage", "holds no arrays of numbers"),
        (b"PK\x03\x04garbage", "holds no arrays of numbers"),
        (None, "No such file"),
    ],
    ids=lambda value: str(type(value).__name__) if not isinstance(value, str) else value[:24],
)
def test_a_file_that_is_no_good_is_refused_in_words_and_never_unpickled(
    offramp: Offramp, folder: Path, tmp_path: Path, content: object, sentence: str
) -> None:
    path = tmp_path / ("real.npz" if isinstance(content, dict) else "real.npy")
    match content:
        case np.ndarray():
            np.save(path, content, allow_pickle=True)
        case dict():
            np.savez(path, allow_pickle=True, **content)
        case bytes():
            path.write_bytes(content)

    done = offramp("explained_networks:Plain", "--example", "6", "--out", "b", "--proof-inputs", path)

    assert done.exit_code == 1, done.output
    assert sentence in " ".join(done.output.split())
    assert "Traceback" not in done.output
    assert not {"b", "exploded"} & files(folder)


def test_what_the_proof_could_not_reach_is_printed(offramp: Offramp, folder: Path) -> None:
    done = offramp("explained_networks:NeverEarly", "--example", "6", "--out", "unreached")

    assert done.exit_code == 0, done.output
    proof = open_bundle(folder / "unreached").manifest.provenance.proof
    assert proof is not None
    assert f"and on {proof.num_inputs} varied inputs\n" in done.stdout
    assert proof.unreached
    assert [line for line in done.stdout.splitlines() if line.startswith("not proved: ")] == [
        f"not proved: {sentence}" for sentence in proof.unreached
    ]


def test_real_inputs_of_a_file_are_proved_on(offramp: Offramp, folder: Path) -> None:
    np.savez(folder / "real.npz", x=np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32))

    done = offramp("explained_networks:Early", "--example", "6", "--out", "reached", "--proof-inputs", "real.npz")

    assert done.exit_code == 0, done.output
    assert "varied from the example and the data" in done.stderr
    assert "inputs, which together take every exit and get every answer" in done.stdout
    assert open_bundle(folder / "reached").manifest.provenance.proof is not None


def test_an_onnx_file_takes_them_without_a_name(offramp: Offramp, folder: Path) -> None:
    write_onnx(folder)
    np.save(folder / "rows.npy", torch.randn(5, 6).numpy())

    done = offramp("plain.onnx", "--exits", "early,late", "--out", "onnx", "--proof-inputs", "rows.npy")

    assert done.exit_code == 0, done.output
    assert "varied from the example and the data" in done.stderr
