import json

import pytest
import torch
from offramp_cli.__main__ import app
from offramp_models import create_network
from typer.testing import CliRunner


@pytest.fixture
def offramp():
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


def test_train_writes_weights_that_load_without_pickled_code_and_a_record(offramp, tmp_path):
    weights = tmp_path / "new" / "w.pt"
    done = offramp("train", "--epochs", 1, "--batch-size", 448, "--seed", 3, "--out", weights)
    assert done.exit_code == 0, done.output
    network = create_network("multi_exit_cnn", seed=9)
    network.load_state_dict(torch.load(weights, weights_only=True))
    record = json.loads(weights.with_suffix(".json").read_text())
    assert record["network"] == "multi_exit_cnn"
    assert record["settings"]["seed"] == 3
    assert len(record["test_accuracy_E"]) == 4
    for index, accuracy in enumerate(record["test_accuracy_E"]):
        assert f"exit_{index}" in done.output
        assert f"{accuracy:.1%}" in done.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--network", "resnet9000"], "network 'resnet9000' is not one of multi_exit_cnn"),
        (["--data", "imagenet"], "data set 'imagenet' is not one of digits"),
        (["--exit-weights", "1,heavy"], "--exit-weights '1,heavy': write numbers"),
        (["--exit-weights", "1,2"], "4 exits need as many loss weights; got 2"),
        (["--batch-size", 5000], "897 training images do not fill a batch of 5000"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_sentence(offramp, tmp_path, arguments, sentence):
    done = offramp("train", "--out", tmp_path / "w.pt", *arguments)
    assert done.exit_code == 1
    assert sentence in done.output
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())
