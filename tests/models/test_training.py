from dataclasses import replace

import numpy as np
import pytest
import torch
from offramp_models import load_data
from offramp_models.data import Augmentation
from offramp_models.networks import MultiExitCNN
from offramp_models.training import Lesson, TrainingSettings, create_method, evaluate, methods, train, weighted_loss
from torch.nn import functional

TINY = {"widths": (4, 8, 8), "blocks": (1, 1, 1), "strides": (1, 2, 2), "upscale": 1}
SETTINGS = TrainingSettings(epochs=2, batch_size=32, learning_rate=0.1)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def tiny(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MultiExitCNN(**TINY)


def test_the_weighted_loss_sums_each_exits_cross_entropy_with_its_weight():
    logits = [torch.randn(4, 3), torch.randn(4, 3)]
    labels = torch.tensor([0, 2, 1, 1])
    expected = 0.25 * functional.cross_entropy(logits[0], labels) + 2.0 * functional.cross_entropy(logits[1], labels)
    torch.testing.assert_close(weighted_loss(logits, labels, (0.25, 2.0)), expected)


def test_the_gradient_is_the_weighted_sum_of_the_exits_gradients():
    weights = (0.5, 1.5)
    labels = torch.tensor([0, 2])
    shared = torch.randn(2, 3, requires_grad=True)
    exits = [shared * 2.0, shared.sin()]
    alone = [torch.autograd.grad(functional.cross_entropy(e, labels), shared, retain_graph=True)[0] for e in exits]
    (together,) = torch.autograd.grad(weighted_loss(exits, labels, weights), shared)
    torch.testing.assert_close(together, weights[0] * alone[0] + weights[1] * alone[1])


def test_a_weight_too_few_is_refused():
    with pytest.raises(ValueError, match="2 exits need as many loss weights; got 1"):
        weighted_loss([torch.zeros(1, 2)] * 2, torch.zeros(1, dtype=torch.long), (1.0,))


def test_the_weighted_method_counts_every_exit_once_unless_told_otherwise():
    logits, labels = [torch.randn(4, 3) for _ in range(3)], torch.tensor([0, 2, 1, 1])
    for weights, counted in (((), (1.0, 1.0, 1.0)), ((0.5, 1.0, 2.0), (0.5, 1.0, 2.0))):
        loss = create_method(TrainingSettings(exit_weights=weights))(Lesson(logits, labels, 0.5))
        torch.testing.assert_close(loss, weighted_loss(logits, labels, counted))


def test_an_unknown_method_is_refused_with_those_there_are(digits):
    with pytest.raises(ValueError, match="training method 'luck' is not one of curriculum_policy_gradient, hybrid"):
        train(tiny(), digits, TrainingSettings(method="luck"))


def test_a_method_is_told_how_far_the_training_has_come(dots, monkeypatch):
    lessons = []

    class Listening(methods.Weighted):
        def __call__(self, lesson):
            lessons.append(lesson)
            return super().__call__(lesson)

    monkeypatch.setattr(methods, "METHODS", {"listening": Listening})
    train(tiny(), dots, TrainingSettings(epochs=2, method="listening"))
    assert [lesson.progress for lesson in lessons] == [step / 6 for step in range(6)]
    assert all(len(lesson.logits_EBC) == 3 and len(lesson.labels_B) == 32 for lesson in lessons)


def test_training_images_are_varied_and_test_images_are_not(dots):
    kept = replace(dots, augmentation=Augmentation())
    networks = [tiny(), tiny()]
    for network, data in zip(networks, (dots, kept), strict=True):
        train(network, data, TrainingSettings(epochs=1))
    assert not torch.equal(networks[0].exits[0].linear.weight, networks[1].exits[0].linear.weight)
    assert evaluate(networks[0], dots, dots.test) == evaluate(networks[0], kept, kept.test)


def test_computing_in_16_bits_learns_about_the_same_and_leaves_weights_of_32(dots):
    networks, losses = [tiny(), tiny()], [[], []]
    for network, seen, bfloat16 in zip(networks, losses, (False, True), strict=True):
        settings = TrainingSettings(epochs=4, bfloat16=bfloat16)
        train(network, dots, settings, lambda step, seen=seen: seen.append(step.loss))
    assert all(weight.dtype == torch.float32 for weight in networks[1].parameters())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_every_epoch_is_reported_with_its_mean_loss_and_the_time_left(dots):
    steps, epochs = [], []
    train(tiny(), dots, TrainingSettings(epochs=3), steps.append, on_epoch=epochs.append)
    assert [(epoch.index, epoch.total) for epoch in epochs] == [(1, 3), (2, 3), (3, 3)]
    for epoch in epochs:
        losses = [step.loss for step in steps[3 * epoch.index - 3 : 3 * epoch.index]]
        assert epoch.loss == pytest.approx(np.mean(losses))
        assert epoch.seconds_left == pytest.approx((3 - epoch.index) * epoch.seconds)


def test_an_exit_of_weight_nothing_learns_nothing(digits):
    network = tiny()
    before = network.exits[0].linear.weight.detach().clone()
    train(network, digits, TrainingSettings(epochs=1, weight_decay=0.0, exit_weights=(0.0, 1.0, 1.0)))
    assert torch.equal(network.exits[0].linear.weight, before)
    assert not torch.equal(network.exits[1].linear.weight, tiny().exits[1].linear.weight)


def test_training_twice_from_one_seed_gives_the_same_weights(digits):
    networks = [tiny(), tiny()]
    for network in networks:
        train(network, digits, SETTINGS)
    one, other = (network.state_dict() for network in networks)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_another_seed_shows_the_images_in_another_order(digits):
    networks = [tiny(), tiny()]
    for seed, network in enumerate(networks):
        train(network, digits, TrainingSettings(epochs=1, seed=seed))
    assert not torch.equal(networks[0].exits[0].linear.weight, networks[1].exits[0].linear.weight)


def test_a_trained_network_knows_more_at_every_exit_than_before(digits):
    network = tiny()
    before = evaluate(network, digits, digits.test)
    record = train(network, digits, SETTINGS)
    assert all(after > untrained for after, untrained in zip(record.test_accuracy_E, before, strict=True))
    assert record.test_accuracy_E[-1] > 0.6
    assert record.test_accuracy_E == evaluate(network, digits, digits.test)


def test_every_step_is_reported_with_the_number_there_will_be(digits):
    steps = []
    train(tiny(), digits, SETTINGS, steps.append)
    total = SETTINGS.epochs * (len(digits.train) // SETTINGS.batch_size)
    assert [(step.index, step.total) for step in steps] == [(index + 1, total) for index in range(total)]
    assert np.mean([step.loss for step in steps[-5:]]) < np.mean([step.loss for step in steps[:5]])


def test_the_network_is_left_ready_to_answer(digits):
    network = tiny()
    train(network, digits, TrainingSettings(epochs=1))
    assert not network.training


def test_a_batch_larger_than_the_data_is_refused(digits):
    with pytest.raises(ValueError, match="do not fill a batch"):
        train(tiny(), digits, TrainingSettings(batch_size=5000))


def test_the_record_is_plain_json(digits):
    record = train(tiny(), digits, TrainingSettings(epochs=1)).to_json()
    assert record["data"] == "digits"
    assert record["settings"]["epochs"] == 1
    assert len(record["test_accuracy_E"]) == 3


def test_evaluation_counts_right_answers_of_each_exit(digits):
    class Always(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, images):
            return [functional.one_hot(torch.full((len(images),), digit), 10) * self.scale for digit in (3, 7)]

    expected = tuple(float((digits.test.labels_N == digit).mean()) for digit in (3, 7))
    assert evaluate(Always(), digits, digits.test) == pytest.approx(expected)
