import json
import subprocess
import sys

import pytest
import typer
from offramp_cli.__main__ import app
from offramp_cli.settings_flags import with_flags
from offramp_server.settings import ServerSettings
from typer.testing import CliRunner

RUNNER = CliRunner(env={"COLUMNS": "250", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture
def settings_of(monkeypatch):
    """Give the settings that flags and environment add up to."""

    def parse(*arguments, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        seen = []

        @with_flags(ServerSettings)
        def probe(bundle: str, **given):
            seen.append((bundle, ServerSettings.load(**given)))

        single = typer.Typer()
        single.command()(probe)
        done = RUNNER.invoke(single, ["some/bundle", *arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        ((bundle, settings),) = seen
        assert bundle == "some/bundle"
        return settings

    return parse


@pytest.mark.parametrize("name", ServerSettings.model_fields)
def test_help_lists_every_setting_with_its_flag_its_variable_and_its_default(name):
    text = " ".join(RUNNER.invoke(app, ["serve", "--help"]).output.replace("│", " ").split())
    assert f"--{name.replace('_', '-')}" in text
    default = ServerSettings.model_fields[name].default
    shown = "unset" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    assert f"[OFFRAMP_{name.upper()}; default: {shown}]" in text


def test_without_flags_every_setting_has_its_default(settings_of):
    assert settings_of() == ServerSettings()


def test_flags_reach_the_settings_with_their_types(settings_of):
    settings = settings_of(
        "--port", "0", "--max-wait-ms", "12.5", "--repository-control", "--api-key", "long enough", "--device", "cuda:1"
    )
    assert (settings.port, settings.max_wait_ms, settings.repository_control) == (0, 12.5, True)
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "long enough"
    assert settings.device == "cuda:1"


def test_a_flag_wins_over_the_environment_and_the_environment_over_the_file(settings_of, tmp_path):
    file = tmp_path / "offramp.toml"
    file.write_text("port = 1111\nmax_batch = 2\nmax_rows = 3\naccess_log = true\n")
    environment = {"OFFRAMP_CONFIG": str(file), "OFFRAMP_MAX_BATCH": "4", "OFFRAMP_MAX_ROWS": "5"}
    settings = settings_of("--max-rows", "6", "--no-access-log", **environment)
    assert (settings.port, settings.max_batch, settings.max_rows, settings.access_log) == (1111, 4, 6, False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--max-batch", "0"], "max_batch: input should be greater than or equal to 1"),
        (["--device", "tpu"], "device: "),
        (["--depth-floor", "2", "--depth-cap", "1"], "depth_cap must not be below depth_floor"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_one_sentence(arguments, sentence):
    done = RUNNER.invoke(app, ["serve", "some/bundle", *arguments])
    assert done.exit_code == 1
    assert sentence in done.output
    assert "Traceback" not in done.output


def test_a_bundle_that_is_not_there_is_named():
    command = [sys.executable, "-m", "offramp_cli", "serve", "no/such/bundle", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "no/such/bundle" in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_are_json_shaped_so_that_a_file_can_hold_them_all():
    assert json.loads(ServerSettings().model_dump_json())["port"] == 8000
