import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offramp_models import load_data
from offramp_models.gates import GatedPass
from offramp_models.networks import create_network
from offramp_models.training import Lesson, TrainingSettings, create_method, train
from offramp_models.training.losses import weighted_loss
from offramp_models.training.method import GatedLesson
from offramp_models.training.resource import compute_B
from torch.nn import functional


def tiny(seed=0, widths=(4, 6)):
    knobs = {"widths": widths, "blocks": 2, "cell_width": 5}
    return create_network("ddi", seed, input_shape=(1, 8, 8), num_classes=10, knobs=knobs)


@torch.no_grad()
def compute_on(network, images):
    passed = network.pass_gates(images)
    return compute_B(GatedLesson(passed, network.gate_costs_G, lambda _: passed)).mean().item()


def lesson_of(decisions_BG, shares_BG=None, costs_G=(0.3, 0.5)):
    logits_BC = torch.zeros(len(decisions_BG), 2)
    passed = GatedPass([logits_BC], decisions_BG, decisions_BG, shares_BG=shares_BG)
    labels_B = torch.zeros(len(decisions_BG), dtype=torch.long)
    return Lesson([logits_BC], labels_B, 0.5, GatedLesson(passed, costs_G, lambda _: passed))


def test_the_compute_of_a_row_is_the_trunk_and_its_open_bodies_without_their_shut_channels():
    decisions_BG = torch.tensor([[1.0, 1], [0, 1], [0, 0]])
    seen = lesson_of(decisions_BG).gated
    torch.testing.assert_close(compute_B(seen), torch.tensor([1.0, 0.7, 0.2]))
    seen = lesson_of(decisions_BG, torch.tensor([[0.5, 1], [0.5, 0.2], [1, 1]])).gated
    torch.testing.assert_close(compute_B(seen), torch.tensor([0.85, 0.3, 0.2]))


@given(st.floats(0.25, 0.95), st.floats(0.1, 5))
def test_the_penalty_pulls_the_compute_to_the_budget_from_both_sides_as_hard(budget, weight):
    method = create_method(TrainingSettings(method="resource", gate_target=budget, gate_weight=weight))
    for share, sign in ((1.0, 1), (0.0, -1)):
        decisions_BG = torch.full((4, 2), share, requires_grad=True)
        lesson = lesson_of(decisions_BG)
        loss = method(lesson)
        loss.backward()
        expected = sign * weight * torch.tensor([0.3, 0.5]) / 4
        torch.testing.assert_close(decisions_BG.grad, expected.expand(4, 2))
        off = abs(compute_B(lesson.gated).mean().item() - budget)
        classified = weighted_loss(lesson.logits_EBC, lesson.labels_B).item()
        assert loss.item() == pytest.approx(classified + weight * off, abs=1e-5)


def test_channels_are_pulled_as_their_body_costs():
    method = create_method(TrainingSettings(method="resource", gate_target=0.4, gate_weight=1.0))
    shares_BG = torch.ones(1, 2, requires_grad=True)
    method(lesson_of(torch.tensor([[1.0, 0]]), shares_BG)).backward()
    torch.testing.assert_close(shares_BG.grad, torch.tensor([[0.3, 0]]))


def test_the_gates_share_one_cell_that_remembers_the_earlier_blocks():
    network, images = tiny().eval(), torch.rand(3, 1, 8, 8)
    before = network.pass_gates(images).scores_BG
    torch.nn.init.normal_(network.gates.inputs[1].weight, std=3)
    after = network.pass_gates(images).scores_BG
    changed = [not torch.equal(one, other) for one, other in zip(before.T, after.T, strict=True)]
    assert changed[0] is False
    assert all(changed[1:])


def test_a_shut_channel_stands_for_a_zero_between_the_convolutions():
    block = tiny().eval().blocks[1]
    features, open_BD = torch.rand(2, 4, 8, 8), torch.tensor([[1.0, 0, 1, 0], [1, 1, 1, 1]])
    added = block.body(features, open_BD)
    torch.testing.assert_close(added[1:], block.body(features)[1:])
    hidden = functional.relu(block.norm1(block.conv1(features)))
    kept = functional.conv2d(hidden[:1, [0, 2]], block.conv2.weight[:, [0, 2]], padding=1)
    torch.testing.assert_close(added[:1], block.norm2(kept))


def test_channels_are_open_or_shut_and_their_gradient_is_that_of_their_score():
    network, state_BF = tiny(), (torch.rand(3, 5), torch.zeros(3, 5))
    head = network.gates.channels[0]
    score_BD = torch.sigmoid(head(state_BF[0]))
    (expected,) = torch.autograd.grad(score_BD.sum(), head.bias)
    open_BD = network.gates.open_channels(state_BF, 0)
    (found,) = torch.autograd.grad(open_BD.sum(), head.bias)
    torch.testing.assert_close(found, expected)
    assert torch.equal(open_BD, (score_BD >= 0.5).float())
    assert torch.equal(network.eval().gates.open_channels(state_BF, 0), open_BD)


def test_an_image_says_which_share_of_each_body_it_needs():
    network = tiny().eval()
    torch.nn.init.constant_(network.gates.channels[2].bias, -9)
    torch.nn.init.constant_(network.gates.channels[3].bias, 9)
    shares_BG = network.pass_gates(torch.rand(3, 1, 8, 8)).shares_BG
    assert shares_BG.shape == (3, 4)
    assert shares_BG[:, 2:].tolist() == [[0, 1]] * 3


def test_training_moves_the_compute_to_the_budget_and_the_answers_hold():
    data, computes = load_data("digits"), []
    for budget in (0.5, 0.8):
        network = create_network(
            "ddi", input_shape=(1, 8, 8), num_classes=10, knobs={"widths": (6, 12), "blocks": 2, "cell_width": 5}
        )
        record = train(network, data, TrainingSettings(method="resource", epochs=8, gate_target=budget))
        assert record.test_accuracy_E[0] > 0.9
        computes.append(compute_on(network, torch.from_numpy(data.inputs(data.test))))
    assert computes == pytest.approx([0.5, 0.8], abs=0.03)
