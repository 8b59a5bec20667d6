from pathlib import Path

import pytest
from offramp_contract.errors import InvalidValue
from offramp_server.engine_settings import EngineSettings
from offramp_server.settings import ServerSettings


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "offramp.toml"
    path.write_text('max_rows = 7\nmax_batch = 8\ndevice = "cpu"\n')
    return path


def test_flags_win_over_environment_and_environment_over_the_file(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFRAMP_MAX_BATCH", "16")
    monkeypatch.setenv("OFFRAMP_PORT", "9000")
    settings = ServerSettings.load(config=config, port=9001)
    assert (settings.port, settings.max_batch, settings.max_rows, settings.device) == (9001, 16, 7, "cpu")
    assert settings.host == "127.0.0.1"


def test_the_file_may_be_named_by_the_environment(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFRAMP_CONFIG", str(config))
    assert ServerSettings.load().max_rows == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"port": 70000}, "port: input should be less than or equal to 65535"),
        ({"port": "tcp://10.0.0.7:8000"}, "port: this is Kubernetes' own OFFRAMP_PORT"),
        ({"device": "tpu"}, "device: "),
        ({"api_key": "short"}, "api_key: "),
        ({"depth_cap": 0, "depth_floor": 1}, "depth_cap must not be below depth_floor"),
        ({"default_latency_ms": 100, "max_latency_ms": 10}, "default_latency_ms must not be above"),
        ({"max_bacth": 3}, "max_bacth: extra inputs are not permitted"),
        ({"config": "/nowhere/offramp.toml"}, "config: there is no file"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(given: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        ServerSettings.load(**given)


@pytest.mark.parametrize(("text", "word"), [("max_bacth = 3\n", "max_bacth"), ("max_rows = \n", "settings")])
def test_a_file_with_an_unknown_key_or_broken_syntax_is_refused(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "offramp.toml"
    path.write_text(text)
    with pytest.raises(InvalidValue, match=word):
        ServerSettings.load(config=path)


def test_an_environment_variable_that_is_no_setting_is_pointed_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OFFRAMP_MAX_BACTH", "16")
    ServerSettings.load()
    assert "OFFRAMP_MAX_BACTH is no setting" in caplog.text


def test_every_field_says_what_turning_it_costs() -> None:
    for name, field in ServerSettings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_the_engine_gets_its_share() -> None:
    share = {"max_batch": 5, "max_inflight_samples": 6, "default_latency_ms": 7, "margin_ms": 0.5, "inline_ms": 0}
    assert ServerSettings.load(**share).engine_settings() == EngineSettings(**share)


def test_the_scheduler_gets_the_rules_that_are_turned_off() -> None:
    off = {"rebatch": False, "hold": False, "batch_timeout_ms": 3.0, "forced_exits": False}
    settings = ServerSettings.load(**off).engine_settings()
    assert {name: getattr(settings, name) for name in off} == off
