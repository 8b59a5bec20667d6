import pickle
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from offramp_contract.errors import TraceError
from offramp_exporter import load_module, parse_example
from offramp_exporter.load import load_weights

NETWORK = """
import torch

class Net(torch.nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.head = torch.nn.Linear(4, width)

    def forward(self, x):
        return [self.head(x)]

def needs(argument): ...
def gives_nothing(): ...
built = Net(5)
"""


class RunsCode:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's own folder, with a package called `models`."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    (tmp_path / "models" / "net.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "models"]:
        del sys.modules[name]


def test_the_users_own_models_package_is_found_from_the_current_folder(project: Path) -> None:
    path_before = list(sys.path)

    module = load_module("models.net:Net")

    assert type(module).__module__ == "models.net"
    assert not module.training
    assert sys.path == path_before


def test_a_module_that_exists_already_is_taken_as_it_is(project: Path) -> None:
    assert load_module("models.net:built").head.out_features == 5  # type: ignore[union-attr]


def test_weights_are_loaded(project: Path) -> None:
    state = {"head.weight": torch.full((3, 4), 2.0), "head.bias": torch.zeros(3)}
    torch.save(state, project / "w.pt")
    torch.save({"state_dict": state, "epoch": 3}, project / "checkpoint.pt")

    for file in ("w.pt", "checkpoint.pt"):
        module = load_module("models.net:Net", project / file)
        assert (module.head.weight == 2.0).all()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("models.net", "write package.module:factory"),
        ("models.nothing:Net", "no module 'models.nothing'"),
        ("models.net:Nothing", "has no 'Nothing'"),
        ("models.net:needs", "cannot be called without arguments"),
        ("models.net:gives_nothing", "gives a NoneType"),
        ("models.net:torch", "is no class, function or module"),
    ],
)
def test_a_target_that_is_no_network_is_refused_with_what_to_write(project: Path, target: str, sentence: str) -> None:
    with pytest.raises(TraceError, match=sentence):
        load_module(target)


def test_weights_that_do_not_fit_are_named(project: Path) -> None:
    cases = {
        "missing": ({"head.weight": torch.zeros(3, 4)}, "lacks head.bias"),
        "shape": ({"head.weight": torch.zeros(3, 5), "head.bias": torch.zeros(3)}, "size mismatch for head.weight"),
        "list": ([1, 2], "holds a list"),
    }
    for name, (state, sentence) in cases.items():
        torch.save(state, project / f"{name}.pt")
        with pytest.raises(TraceError, match=sentence):
            load_module("models.net:Net", project / f"{name}.pt")


@given(cut=st.integers(0, 2000), changes=st.lists(st.tuples(st.integers(0, 1999), st.integers(0, 255)), max_size=8))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_broken_weights_file_ends_in_words(tmp_path: Path, cut: int, changes: list[tuple[int, int]]) -> None:
    path, network = tmp_path / "w.pt", torch.nn.Linear(2, 2)
    torch.save(network.state_dict(), path)
    written = bytearray(path.read_bytes())
    for place, byte in changes:
        written[place % len(written)] = byte
    path.write_bytes(bytes(written[: len(written) - cut]))

    with suppress(TraceError):  # it may be whole still
        load_weights(network, path)


def test_a_state_dict_that_is_none_is_refused(tmp_path: Path) -> None:
    cases = {"names": {1: torch.zeros(2)}, "values": {"weight": [1.0, 2.0], "bias": torch.zeros(2)}}
    for name, state in cases.items():
        torch.save(state, tmp_path / f"{name}.pt")
        with pytest.raises(TraceError, match=r"holds a dict, no state_dict|does not fit Linear"):
            load_weights(torch.nn.Linear(2, 2), tmp_path / f"{name}.pt")


def test_weights_that_would_run_code_are_refused(project: Path) -> None:
    torch.save(load_module("models.net:Net"), project / "whole.pt")
    (project / "garbage.pt").write_bytes(b"no weights at all")
    (project / "code.pt").write_bytes(pickle.dumps(RunsCode(project / "ran")))
    torch.save({"head.weight": RunsCode(project / "ran")}, project / "code_in_zip.pt")

    for name in ("whole.pt", "garbage.pt", "code.pt", "code_in_zip.pt"):
        with pytest.raises(TraceError, match="holds no plain state_dict"):
            load_module("models.net:Net", project / name)
    with pytest.raises(TraceError, match="is no file"):
        load_module("models.net:Net", project / "absent.pt")
    assert not (project / "ran").exists()


def test_an_example_is_made_of_its_shape() -> None:
    example = parse_example("3x32x32")

    assert isinstance(example, torch.Tensor)
    assert (example.shape, example.dtype) == ((1, 3, 32, 32), torch.float32)


def test_several_examples_have_names_and_types() -> None:
    example = parse_example("ids=16:int64, mask=16:bool,scale=1")

    assert isinstance(example, dict)
    assert {name: (tuple(t.shape), t.dtype) for name, t in example.items()} == {
        "ids": ((1, 16), torch.int64),
        "mask": ((1, 16), torch.bool),
        "scale": ((1, 1), torch.float32),
    }


@pytest.mark.parametrize(
    "spec", ["", "3x", "3,32", "axb", "16:complex64", "a=1,a=2", "a=1,2", "9" * 5000, "1" + "x1" * 5000]
)
def test_an_example_that_cannot_be_read_says_how_to_write_one(spec: str) -> None:
    with pytest.raises(TraceError, match="ids=16:int64,mask=16:int64"):
        parse_example(spec)


def test_an_example_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(TraceError, match=r"'9999999x9999999': a row of .* numbers is too large; at most"):
        parse_example("9999999x9999999")
