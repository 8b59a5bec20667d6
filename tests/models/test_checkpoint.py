"""A training that was interrupted goes on as if it had not been."""

import pytest
import torch
from offramp_models.networks import MultiExitCNN
from offramp_models.training import Checkpoint, TrainingSettings, train
from torch import nn

SETTINGS = TrainingSettings(epochs=4, batch_size=32, learning_rate=0.1)


class Interrupted(Exception):
    pass


class WithDropout(MultiExitCNN):
    """Draws from torch's random state, as some networks do while they learn."""

    def forward(self, images):
        return super().forward(nn.functional.dropout(images, 0.2, self.training))


def network(seed=0, width=8):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WithDropout(widths=(4, width), blocks=(1, 1), strides=(1, 2), upscale=1)


def interrupt_at(step_index):
    def on_step(step):
        if step.index == step_index:
            raise Interrupted

    return on_step


@pytest.fixture
def uninterrupted(dots):
    trained = network()
    steps = []
    record = train(trained, dots, SETTINGS, steps.append)
    return trained.state_dict(), [step.loss for step in steps], record


@pytest.mark.parametrize("step", [4, 8, 12])
def test_going_on_from_a_checkpoint_gives_bit_for_bit_the_weights_of_an_uninterrupted_training(
    dots, tmp_path, uninterrupted, step
):
    expected, losses, record = uninterrupted
    path = tmp_path / "training.ckpt"
    with pytest.raises(Interrupted):
        train(network(), dots, SETTINGS, interrupt_at(step), checkpoint=Checkpoint(path))
    torch.manual_seed(step)  # what the process drew in between has no part in it
    resumed, steps = network(seed=9), []
    again = train(resumed, dots, SETTINGS, steps.append, checkpoint=Checkpoint(path, resume=True))
    weights = resumed.state_dict()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert steps[0].index == 3 * ((step - 1) // 3) + 1
    assert [one.loss for one in steps] == losses[steps[0].index - 1 :]
    assert again.test_accuracy_E == record.test_accuracy_E


def test_keeping_checkpoints_changes_nothing(dots, tmp_path, uninterrupted):
    kept = network()
    train(kept, dots, SETTINGS, checkpoint=Checkpoint(tmp_path / "training.ckpt"))
    assert all(torch.equal(weight, uninterrupted[0][key]) for key, weight in kept.state_dict().items())


def test_a_training_that_is_done_is_only_measured_again(dots, tmp_path):
    checkpoint = Checkpoint(tmp_path / "training.ckpt")
    record = train(network(), dots, SETTINGS, checkpoint=checkpoint)
    steps = []
    again = train(network(), dots, SETTINGS, steps.append, checkpoint=Checkpoint(checkpoint.path, resume=True))
    assert steps == []
    assert again.test_accuracy_E == record.test_accuracy_E
    assert again.seconds > 0.9 * record.seconds  # what was before the interruption counts


def test_an_interruption_leaves_the_last_checkpoint_whole_and_nothing_beside_it(dots, tmp_path, monkeypatch):
    path = tmp_path / "training.ckpt"
    with pytest.raises(Interrupted):
        train(network(), dots, SETTINGS, interrupt_at(4), checkpoint=Checkpoint(path))
    whole = path.read_bytes()

    def half(content, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        train(network(), dots, SETTINGS, checkpoint=Checkpoint(path))
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_is_read_without_running_code(dots, tmp_path):
    path = tmp_path / "training.ckpt"
    train(network(), dots, SETTINGS, checkpoint=Checkpoint(path))
    assert torch.load(path, weights_only=True)["epochs_done"] == 4
    torch.save(network(), path)
    with pytest.raises(ValueError, match="is no checkpoint of a training"):
        train(network(), dots, SETTINGS, checkpoint=Checkpoint(path, resume=True))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_checkpoint_is_refused(dots, tmp_path, content):
    path = tmp_path / "training.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"training\.ckpt is no checkpoint of a training"):
        train(network(), dots, SETTINGS, checkpoint=Checkpoint(path, resume=True))


@pytest.mark.parametrize(
    ("settings", "width", "sentence"),
    [
        (TrainingSettings(epochs=4, batch_size=32, learning_rate=0.1, seed=1), 8, "seed is 0 there and 1 here"),
        (TrainingSettings(epochs=9, batch_size=32, learning_rate=0.1), 8, "epochs is 4 there and 9 here"),
        (SETTINGS, 12, "is not one of a WithDropout like this one"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(dots, tmp_path, settings, width, sentence):
    path = tmp_path / "training.ckpt"
    train(network(), dots, SETTINGS, checkpoint=Checkpoint(path))
    with pytest.raises(ValueError, match=sentence):
        train(network(width=width), dots, settings, checkpoint=Checkpoint(path, resume=True))


def test_training_leaves_the_random_state_of_the_caller_alone(dots):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    train(network(), dots, SETTINGS)
    assert torch.equal(torch.rand(1), expected)
