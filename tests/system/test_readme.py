"""Every command block of the README, run in order, as a reader would: in one folder, against one server."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from offramp_cli.server_process import server_process

pytestmark = pytest.mark.system

README = Path(__file__).parents[2] / "README.md"
FENCE = re.compile(r"(?:<!-- (?P<note>[^>]*?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)
WRITTEN_FOR = "localhost:8000"


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    note: str

    @property
    def is_left_out(self) -> bool:
        return self.note.startswith("not run here: ")


BLOCKS = [Block(m["language"], m["text"], m["note"] or "") for m in FENCE.finditer(README.read_text())]


ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""OpenMP threads that spin for each other make a busy machine's training ten times slower."""


def run(block: Block, folder: Path, address: str) -> str:
    text = block.text.replace(WRITTEN_FOR, address)
    command = ["bash", "-euo", "pipefail", "-c", text] if block.language == "bash" else [sys.executable, "-c", text]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, **ONE_THREAD}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[str, str]:
    """Run everything; gives each block's output by its text."""
    folder = tmp_path_factory.mktemp("readme")
    printed: dict[str, str] = {}
    to_run = [block for block in BLOCKS if block.language in ("bash", "python") and not block.is_left_out]
    starts = next(i for i, block in enumerate(to_run) if block.note == "server")
    for block in to_run[:starts]:
        if block.note.startswith("file: "):
            file = folder / block.note.removeprefix("file: ")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
        else:
            printed[block.text] = run(block, folder, WRITTEN_FOR)
    words = to_run[starts].text.split()
    assert words[:2] == ["offramp", "serve"]
    flags = [
        word for flag, word in zip(words[3::2], words[4::2], strict=True) if flag != "--port" for word in (flag, word)
    ]
    with server_process(folder / words[2], folder / "server.log", flags) as url:
        for block in to_run[starts + 1 :]:
            printed[block.text] = run(block, folder, url.removeprefix("http://"))
    return printed


def output_of(outputs: dict[str, str], words: str) -> str:
    return next(output for text, output in outputs.items() if words in text)


def test_every_block_runs(outputs):
    assert len(outputs) == 13


def test_the_examples_answer_what_the_text_says(outputs):
    answers = output_of(
        outputs, "--data-binary @seven.png -H 'content-type: image/png' 'localhost:8000/v1/classify?latency"
    )
    assert answers.count('"predictions"') == 5
    assert '"label":"7"' in answers
    budgets = output_of(outputs, "classify?compute=0.4")
    assert budgets.count('"predictions"') == budgets.count('"operating_point":"') == 3
    assert budgets.count('"method":"ltt"') == 2
    assert "of the answers are right" in output_of(outputs, "offramp evaluate")
    events = output_of(outputs, "text/event-stream")
    assert "event: exit" in events
    assert "event: answer" in events
    assert "correct goodput" in output_of(outputs, "offramp loadtest")
    assert "offramp_compute_saved_ratio" in output_of(outputs, "/metrics")


def test_a_block_that_is_left_out_says_why_and_is_checked_elsewhere():
    reasons = [block.note.removeprefix("not run here: ") for block in BLOCKS if block.is_left_out]
    assert len(reasons) == 5
    assert all(len(reason.split()) > 5 for reason in reasons)


def test_files_that_the_readme_links_to_are_there():
    linked = re.findall(r"\]\(((?!http)[^)#]+)\)", README.read_text())
    assert linked
    for path in linked:
        assert (README.parent / path).exists(), path
