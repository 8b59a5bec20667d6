import subprocess
import sys

import pytest
from offramp_cli.__main__ import COMMANDS, app
from typer.testing import CliRunner

HEAVY = ("torch", "onnxruntime", "onnx", "fastapi", "sklearn", "numpy", "offramp_exporter", "offramp_models")


@pytest.fixture
def offramp():
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
sys.argv[0] = "offramp"
from offramp_cli.__main__ import main
main()
"""


def python(code, *arguments):
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_importing_the_command_line_imports_none_of_the_parts():
    code = f"import sys, offramp_cli.__main__; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert python(code).stdout.strip() == "[]"


def test_help_needs_neither_torch_nor_onnxruntime():
    done = python(WITHOUT.format(blocked=["torch", "onnxruntime", "sklearn"]), "--help")
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(offramp, command):
    done = offramp(command, "--help")
    assert done.exit_code == 0, done.output
    assert f"offramp {command}" in done.output


def test_an_unknown_command_is_a_usage_error(offramp):
    done = offramp("calibrat")
    assert done.exit_code == 2
    assert "No such command 'calibrat'" in done.output


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("torch", ["models"], "offramp[export]"),
        ("torch", ["train", "--out", "w.pt"], "offramp[export]"),
        ("torch", ["export", "multi_exit_cnn", "--data", "digits", "--out", "b"], "offramp[export]"),
        ("sklearn", ["train", "--out", "w.pt"], "offramp[export]"),
        ("onnxruntime", ["serve", "b"], "offramp[cpu]"),
        ("onnxruntime", ["calibrate", "b", "--data", "digits"], "offramp[cpu]"),
        ("scipy", ["calibrate", "b", "--data", "digits"], "offramp[calibrate]"),
    ],
)
def test_a_missing_extra_is_named_in_one_sentence(tmp_path, monkeypatch, package, arguments, extra):
    monkeypatch.chdir(tmp_path)
    done = python(WITHOUT.format(blocked=[package]), *arguments)
    assert done.returncode == 1
    assert package in done.stderr
    assert extra in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_named_in_one_sentence_before_the_training(offramp, tmp_path):
    blocker = tmp_path / "file"
    blocker.touch()
    done = offramp("train", "--out", blocker / "w.pt")
    assert done.exit_code == 1
    assert str(blocker) in done.output
    assert "training" not in done.output
    assert isinstance(done.exception, SystemExit)
