import json

import numpy as np
import pytest
import torch
from offramp_cli.__main__ import app
from offramp_models import load_data
from offramp_models.data import DATA_SETS
from offramp_models.exits import EXITS
from offramp_models.gates import GATES, RELAXATIONS
from offramp_models.networks import NETWORKS, NetworkPlan, create_network, plan_network
from offramp_models.training import METHODS, evaluate, measure
from offramp_runtime import StageExecutor, open_bundle, open_device, run_all_exits
from typer.testing import CliRunner

TINY_MSDNET = (
    "--threads",
    "1",
    "--network",
    "msdnet",
    "--knob",
    "channels=2",
    "--knob",
    "growth=2",
    "--knob",
    "num_exits=4",
)


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
        (
            ["--network", "resnet9000"],
            "network 'resnet9000' is not one of blockdrop, convnet_aig, ddi, layerdrop, msdnet",
        ),
        (["--data", "imagenet"], "data set 'imagenet' is not one of cifar100, digits, fashion_mnist"),
        (["--exit-weights", "1,heavy"], "--exit-weights '1,heavy': write numbers"),
        (["--exit-weights", "1,2"], "4 exits need as many loss weights; got 2"),
        (["--batch-size", 5000], "897 training images do not fill a batch of 5000"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--exits", "magic"], "exits 'magic' is not one of conv_pool, mixed_pool, pooled_linear"),
        (
            ["--method", "luck"],
            "training method 'luck' is not one of curriculum_policy_gradient, hybrid_policy_gradient",
        ),
        (
            ["--method", "target_rate"],
            "training method 'target_rate' is for networks with gates; MultiExitCNN has none",
        ),
        (["--gate-relaxation", "gumbel"], "gate_relaxation is for networks with gates; MultiExitCNN has none"),
        (["--network", "skipnet", "--gate-relaxation", "luck"], "gate relaxation 'luck' is not one of gumbel"),
        (["--network", "skipnet", "--gates", "luck"], "gates 'luck' is not one of feed_forward, recurrent"),
        (
            ["--network", "resnet", "--gates", "recurrent"],
            "network 'resnet' leaves no choice of gates; these do: skipnet",
        ),
        (["--gate-target", "1.5"], "gate_target must be a share from 0 to 1; got 1.5"),
        (["--gate-weight", "nan"], "gate_weight must be from 0 to 1000; got nan"),
        (["--policy", "luck"], "policy: the kind must be one of"),
        (["--policy", "{broken"], "is not valid JSON"),
        (["--knob", "widths"], "--knob 'widths': write its name and whole numbers"),
        (["--knob", "widths=8,many"], "--knob 'widths=8,many': write its name and whole numbers"),
        (["--knob", "depth=3"], "network 'multi_exit_cnn' has no knob 'depth'"),
        (["--network", "resnet", "--knob", "widths=0,8"], "widths must be whole numbers from 1 to 8192; got 0"),
        (["--resume"], "--resume needs --checkpoint"),
        (["--data", "cifar100", "--data-dir", "/nowhere"], "/nowhere holds no cifar-100-binary"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_sentence(offramp, tmp_path, arguments, sentence):
    done = offramp("train", "--out", tmp_path / "w.pt", *arguments)
    assert done.exit_code == 1
    assert sentence in done.output
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


def test_what_was_chosen_for_a_training_is_recorded_and_exported_without_being_said_again(offramp, tmp_path):
    weights, record = tmp_path / "w.pt", tmp_path / "w.json"
    chosen = ("--exits", "mixed_pool", "--policy", '{"kind": "entropy", "threshold": 0.2}', "--exit-weights", "1,1,1,2")
    done = offramp("train", *TINY_MSDNET, *chosen, "--epochs", 1, "--seed", 5, "--out", weights)
    assert done.exit_code == 0, done.output
    written = json.loads(record.read_text())
    assert (written["network"], written["exits"], written["data"]) == ("msdnet", "mixed_pool", "digits")
    assert (written["input_shape"], written["num_classes"], written["settings"]["seed"]) == ([1, 8, 8], 10, 5)
    assert written["settings"]["method"] == "weighted"

    done = offramp(
        "export", "msdnet", "--weights", weights, "--data", "digits", "--training", record, "--out", tmp_path / "b"
    )
    assert done.exit_code == 0, done.output
    bundle = open_bundle(tmp_path / "b")
    assert bundle.manifest.default_policy.model_dump(mode="json") == written["policy"]
    assert bundle.manifest.provenance.training == written
    data = load_data("digits", written["settings"]["seed"])
    executor = StageExecutor(bundle, open_device("cpu", 1))
    exits = run_all_exits(executor, {bundle.manifest.inputs[0].name: data.inputs(data.test)})
    accuracy_E = [float(np.mean(logits.argmax(1) == data.test.labels_N)) for logits, _ in exits]
    assert accuracy_E == pytest.approx(written["test_accuracy_E"], abs=0.003)


@pytest.mark.parametrize(
    ("arguments", "changes", "sentence"),
    [
        (["resnet", "--data", "digits"], {}, "the record is that of a msdnet; export that, not resnet"),
        (["msdnet", "--data", "fashion_mnist"], {}, "--data is fashion_mnist, but the network was trained on digits"),
        (["msdnet", "--data", "digits"], {"knobs": {"growth": 0}}, "growth must be whole numbers from 1 to 8192"),
        (["msdnet", "--data", "digits"], {"policy": "luck"}, "policy: the kind must be one of"),
    ],
)
def test_a_record_that_does_not_belong_is_refused(offramp, tmp_path, arguments, changes, sentence):
    record = plan_network("msdnet", input_shape=(1, 8, 8), num_classes=10).to_json() | {"data": "digits"} | changes
    (tmp_path / "w.json").write_text(json.dumps(record))
    done = offramp("export", *arguments, "--training", tmp_path / "w.json", "--out", tmp_path / "b")
    assert done.exit_code == 1
    assert sentence in done.output
    assert not (tmp_path / "b").exists()


def test_a_gated_networks_gates_are_shown_and_recorded_and_it_is_built_again_with_them(offramp, tmp_path):
    weights = tmp_path / "w.pt"
    chosen = ("--network", "skipnet", "--gates", "feed_forward", "--knob", "widths=4,8", "--knob", "blocks=1")
    how = ("--method", "target_rate", "--gate-target", 0.3, "--gate-weight", 4, "--gate-relaxation", "semantic_hashing")
    done = offramp("train", *chosen, *how, "--epochs", 2, "--threads", 1, "--out", weights)
    assert done.exit_code == 0, done.output
    record = json.loads(weights.with_suffix(".json").read_text())
    assert record["gates"] == "feed_forward"
    assert record["settings"]["gate_target"] == 0.3
    assert record["settings"]["gate_relaxation"] == "semantic_hashing"
    shares = record["test_gates"]["open_share_G"]
    assert [f"gate_{index}  {share:.1%}" in done.output for index, share in enumerate(shares)] == [True, True]
    assert f"gates open {np.mean(shares):.1%}, depth {record['test_gates']['depth']:.1%}" in done.output
    assert done.output.count("gates open") == 3  # each epoch, and the test images
    network = NetworkPlan.from_record(record).build()
    network.load_state_dict(torch.load(weights, weights_only=True))
    data = load_data("digits", record["settings"]["seed"])
    measured = measure(network, data, data.test)
    assert list(measured.accuracy_E) == record["test_accuracy_E"]
    assert list(measured.gates.open_share_G) == shares


def test_a_training_interrupted_at_the_keyboard_says_how_to_go_on_and_goes_on(offramp, tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("whole.pt", "again.pt", "training.ckpt")]
    asked = ("train", *TINY_MSDNET, "--epochs", 3, "--batch-size", 128)
    assert offramp(*asked, "--out", paths[0]).exit_code == 0
    kept = (*asked, "--checkpoint", paths[2], "--resume", "--out", paths[1])

    def interrupt(epoch):
        if epoch.index == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("offramp_cli.train._show_epoch", interrupt)
        stopped = offramp(*kept)
    assert stopped.exit_code != 0
    assert "is whole: go on with --resume" in stopped.output
    assert not paths[1].exists()
    done = offramp(*kept)
    assert done.exit_code == 0, done.output
    assert "epoch 3 of 3: loss" in done.output
    assert "epoch 2 of 3: loss" not in done.output
    whole, again = (torch.load(path, weights_only=True) for path in paths[:2])
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_weights_know_the_images_that_were_not_held_out_as_well_as_the_record_says(offramp, tmp_path):
    weights = tmp_path / "w.pt"
    assert offramp("train", *TINY_MSDNET, "--epochs", 1, "--seed", 2, "--out", weights).exit_code == 0
    record = json.loads(weights.with_suffix(".json").read_text())
    network = NetworkPlan.from_record(record).build()
    network.load_state_dict(torch.load(weights, weights_only=True))
    data = load_data(record["data"], record["settings"]["seed"])
    assert list(evaluate(network, data, data.test)) == record["test_accuracy_E"]


def test_models_lists_what_can_be_chosen(offramp):
    done = offramp("models")
    assert done.exit_code == 0, done.output
    for name in (*NETWORKS, *EXITS, *GATES, *RELAXATIONS, *METHODS, *DATA_SETS):
        (line,) = [line for line in done.output.splitlines() if line.startswith(f"{name} ") and "--knob" not in line]
        assert len(line.removeprefix(name).split()) > 3
    assert "868,088" in done.output
    assert "resnet --knob widths=16,32,64  blocks=3  num_exits=5" in done.output
    assert "skipnet --gates recurrent --knob widths=16,32,64  blocks=6  num_exits=1" in done.output
