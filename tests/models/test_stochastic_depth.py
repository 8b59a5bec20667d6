from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offramp_models import load_data
from offramp_models.gates import Choice, gate
from offramp_models.networks import ResNet, create_network
from offramp_models.networks.stochastic_depth import survival_probabilities
from offramp_models.training import TrainingSettings, evaluate, train

TINY = {"widths": (4, 6), "blocks": 2}


def tiny(seed=0, **changes):
    return create_network("stochastic_depth", seed, input_shape=(1, 8, 8), num_classes=10, knobs=TINY | changes)


def above(threshold):
    """Decide as the server does with this threshold."""
    return lambda log_odds_B, _: Choice(gate(torch.sigmoid(log_odds_B), threshold))


@given(st.integers(1, 64), st.floats(0.01, 1.0))
def test_survival_falls_linearly_from_the_input_to_the_last_block(num_blocks, last):
    survival_G = survival_probabilities(num_blocks, last)
    assert survival_G[-1] == pytest.approx(last)
    steps = [early - late for early, late in pairwise((1.0, *survival_G))]
    assert steps == pytest.approx([(1 - last) / num_blocks] * num_blocks)


def test_blocks_take_part_in_training_steps_as_often_as_they_survive():
    network, images = tiny(survival_percent=40), torch.rand(2, 1, 8, 8)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        drawn = torch.stack([network.pass_gates(images).decisions_BG for _ in range(400)])
    assert torch.equal(drawn[:, 0], drawn[:, 1])  # the whole batch alike
    torch.testing.assert_close(drawn.mean(dim=(0, 1)), torch.tensor([0.85, 0.7, 0.55, 0.4]), atol=0.07, rtol=0)


def test_in_evaluation_a_block_adds_what_it_added_on_average_in_training():
    network, features = tiny(), torch.rand(3, 4, 8, 8) + 5  # large enough for the last ReLU to be the identity
    block = network.eval().blocks[1]
    torch.nn.init.constant_(block.norm2.weight, 0.1)
    survival = network.survival_G[1]
    shut, opened = (block(features, torch.full((3,), decision)) for decision in (0.0, 1.0))
    averaged = survival * opened + (1 - survival) * shut
    torch.testing.assert_close(network.run_block(1, features, torch.ones(3)), averaged)
    network.train(), block.eval()
    torch.testing.assert_close(network.run_block(1, features, torch.ones(3)), opened)


def test_a_block_that_is_shut_leaves_its_shortcut():
    network, features = tiny().eval(), torch.rand(3, 4, 8, 8)
    shortcut = network.blocks[2].shortcut(features).relu()
    assert torch.equal(network.run_block(2, features, torch.zeros(3)), shortcut)


@pytest.mark.parametrize("survival_percent", [1, 50, 90])
def test_all_gates_are_open_at_a_half_and_the_deepest_shuts_first(survival_percent):
    network, images = tiny(survival_percent=survival_percent).eval(), torch.rand(2, 1, 8, 8)
    scores_G = network.pass_gates(images).scores_BG[0].tolist()
    assert scores_G == sorted(scores_G, reverse=True)
    opened = [network.pass_gates(images, above(threshold)).decisions_BG[0].tolist() for threshold in (0.5, *scores_G)]
    assert opened == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert not network.pass_gates(images, above(1.0)).decisions_BG.any()


def test_where_every_block_survives_it_is_the_plain_residual_network():
    network, plain = tiny(survival_percent=100), ResNet((1, 8, 8), 10, "pooled_linear", **TINY, num_exits=1)
    weights = [value for key, value in network.state_dict().items() if not key.startswith("gates.")]
    plain.load_state_dict(dict(zip(plain.state_dict(), weights, strict=True)))
    images = torch.rand(4, 1, 8, 8)
    for mode in (True, False):
        assert torch.equal(network.train(mode)(images)[0], plain.train(mode)(images)[0])


def test_a_survival_of_more_than_always_is_refused():
    with pytest.raises(ValueError, match="survival_percent must be 1 to 100; got 120"):
        create_network("stochastic_depth", knobs={"survival_percent": 120})


def test_a_trained_one_still_classifies_with_a_third_of_its_blocks_shut():
    data, network = load_data("digits"), tiny(widths=(6, 12), blocks=3)
    train(network, data, TrainingSettings(epochs=10))
    assert evaluate(network, data, data.test)[0] > 0.85
    images, labels = torch.from_numpy(data.inputs(data.test)), torch.from_numpy(data.test.labels_N)
    with torch.no_grad():
        passed = network.pass_gates(images, above(0.8))
    assert passed.decisions_BG[0].tolist() == [1, 1, 1, 1, 0, 0]
    assert (passed.logits_EBC[0].argmax(1) == labels).float().mean() > 0.8
