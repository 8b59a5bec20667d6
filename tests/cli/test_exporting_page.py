"""Every block of the page on exporting, run in order in one folder, as a reader would."""

import re
import shlex
from pathlib import Path

import pytest
from offramp_cli.__main__ import app
from offramp_contract.policy_spec import NativeSpec
from offramp_runtime import open_bundle
from typer.testing import CliRunner

PAGE = Path(__file__).parents[2] / "docs/exporting.md"
FENCE = re.compile(r"(?:<!-- file: (?P<file>[^>]*?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Write the page's files and run its commands; gives the folder and what each command printed."""
    folder, printed = tmp_path_factory.mktemp("page"), {}
    runner = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in FENCE.finditer(PAGE.read_text()):
            if block["file"]:
                path = folder / block["file"]
                path.parent.mkdir(exist_ok=True)
                path.write_text(block["text"])
                continue
            assert block["language"] == "bash"
            for command in block["text"].strip().splitlines():
                name, *arguments = shlex.split(command)
                assert name == "offramp"
                done = runner.invoke(app, arguments)
                assert done.exit_code == 0, done.output
                printed[command] = done.stdout
    return folder, printed


def test_every_command_runs_and_does_what_the_page_says(ran: tuple[Path, dict[str, str]]) -> None:
    folder, printed = ran

    assert len(printed) == 3
    explained = next(text for command, text in printed.items() if command.endswith("--explain"))
    assert re.search(r"exit_0  where score > 0.2 at sure.py:\d+ \(if torch.softmax", explained)
    assert explained.rstrip().endswith("nothing was written")
    sure = open_bundle(folder / "bundles/sure").manifest
    assert sure.default_policy == NativeSpec()
    assert sure.provenance.proof is not None
    assert sure.provenance.proof.unreached == ()
    assert len(open_bundle(folder / "bundles/all-exits").manifest.exits) == len(sure.exits) == 3


def test_files_that_the_page_links_to_are_there() -> None:
    linked = re.findall(r"\]\(((?!http)[^)#]+)\)", PAGE.read_text())

    assert linked
    assert all((PAGE.parent / path).exists() for path in linked)
