from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offramp_models import load_data
from offramp_models.gates import Choice, gate
from offramp_models.networks import LayerDrop, create_network
from offramp_models.networks.layerdrop import every_other, priorities
from offramp_models.training import TrainingSettings, evaluate, train


def tiny(seed=0, **changes):
    knobs = {"depth": 4, "width": 8, "heads": 2, "grid": 4} | changes
    return create_network("layerdrop", seed, input_shape=(1, 8, 8), num_classes=10, knobs=knobs)


def above(threshold):
    """Decide as the server does with this threshold."""
    return lambda log_odds_B, _: Choice(gate(torch.sigmoid(log_odds_B), threshold))


def longest_run(dropped, depth):
    """Give how many layers next to each other are dropped at most."""
    marks = "".join("x" if layer in dropped else " " for layer in range(depth))
    return max(len(run) for run in marks.split(" "))


@given(st.integers(1, 64))
def test_every_layer_is_dropped_once_and_the_first_one_last(depth):
    order = every_other(range(depth))
    assert sorted(order) == list(range(depth))
    assert order[-1] == 0


@given(st.integers(1, 6), st.integers(1, 10))
def test_dropping_one_layer_in_k_drops_every_kth_as_the_paper_says(doublings, groups):
    k = 2**doublings
    depth = k * groups
    assert sorted(every_other(range(depth))[:groups]) == list(range(k - 1, depth, k))


@given(st.integers(2, 64), st.data())
def test_dropped_layers_are_spread_evenly_however_many_they_are(depth, data):
    num_dropped = data.draw(st.integers(1, depth - 1))
    dropped = set(every_other(range(depth))[:num_dropped])
    kept = depth - num_dropped
    assert longest_run(dropped, depth) <= 2 * -(-num_dropped // kept)
    if num_dropped <= depth // 2:
        assert longest_run(dropped, depth) == 1


@given(st.integers(1, 64))
def test_raising_the_threshold_from_a_half_to_1_drops_the_layers_in_that_order(depth):
    priorities_G = priorities(depth)
    assert all(0.5 < priority < 1 for priority in priorities_G)
    assert sorted(range(depth), key=priorities_G.__getitem__) == every_other(range(depth))


def test_the_gates_open_by_their_priority_for_every_image_alike():
    network, images = tiny().eval(), torch.rand(3, 1, 8, 8)
    scores = network.pass_gates(images).scores_BG
    torch.testing.assert_close(scores, torch.tensor([priorities(4)] * 3))
    opened = [network.pass_gates(images, above(threshold)).decisions_BG[0].tolist() for threshold in (0.5, 0.65, 1.0)]
    assert opened == [[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]


def test_a_shut_layer_leaves_its_input_as_it_is():
    network, images = tiny().eval(), torch.rand(3, 1, 8, 8)
    expected = network.pass_gates(images, above(0.65)).logits_EBC[0]
    for layer in (network.layers[3].project, network.layers[3].each[-1]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    torch.testing.assert_close(network(images)[0], expected)


def test_layers_are_left_out_of_a_training_step_at_the_rate_asked_for():
    network, images = tiny(kept_percent=70), torch.rand(2, 1, 8, 8)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        drawn = torch.stack([network.pass_gates(images).decisions_BG for _ in range(400)])
    assert torch.equal(drawn[:, 0], drawn[:, 1])  # the whole batch alike
    torch.testing.assert_close(drawn.mean(dim=(0, 1)), torch.full((4,), 0.7), atol=0.07, rtol=0)


def test_with_all_layers_kept_training_and_evaluation_are_the_plain_transformer():
    network, images = tiny(kept_percent=100), torch.rand(4, 1, 8, 8)
    passed = network.pass_gates(images)
    assert passed.decisions_BG.eq(1).all()
    features = network.patches(images)
    for layer in network.layers:
        features = features + layer(features)
    logits = network.exit.linear(network.norm(features).mean(dim=1))
    torch.testing.assert_close(passed.logits_EBC[0], logits)


@pytest.mark.parametrize(("shape", "grid", "size"), [((1, 8, 8), 4, (4, 4)), ((3, 32, 32), 8, (8, 8)),
                                                     ((1, 28, 28), 8, (7, 7)), ((3, 17, 22), 8, (6, 8)),
                                                     ((1, 3, 5), 8, (3, 5))])  # fmt: skip
def test_images_of_every_size_are_cut_into_patches_to_the_last_pixel(shape, grid, size):
    network = create_network(
        "layerdrop", input_shape=shape, num_classes=7, knobs={"depth": 2, "width": 8, "heads": 2, "grid": grid}
    ).eval()
    assert network.patches.size == size
    images = torch.rand(2, *shape)
    before = network(images)[0]
    images[:, :, -1, -1] += 1
    assert before.shape == (2, 7)
    assert not torch.equal(network(images)[0], before)


def test_a_pixel_in_another_patch_is_another_image():
    network, images = tiny().eval(), torch.zeros(2, 1, 8, 8)
    images[0, 0, 2, 2] = images[1, 0, 4, 2] = 1.0
    one, other = network(images)[0]
    assert not torch.allclose(one, other, atol=1e-4)
    torch.nn.init.zeros_(network.patches.place_PF)
    one, other = network(images)[0]
    torch.testing.assert_close(one, other)


def test_the_layers_are_almost_all_of_the_work_and_cost_the_same():
    network = LayerDrop()
    assert all(one == other for one, other in pairwise(network.gate_costs_G))
    assert 0.85 < sum(network.gate_costs_G) < 1


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"width": 10, "heads": 4}, "heads must divide the width, 10; got 4"),
        ({"kept_percent": 101}, "kept_percent must be 1 to 100; got 101"),
    ],
)
def test_a_transformer_that_cannot_be_is_refused(knobs, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_network("layerdrop", knobs=knobs)


def test_a_trained_one_still_classifies_with_a_third_of_its_layers_shut():
    data, network = load_data("digits"), tiny(depth=3, width=24)
    train(network, data, TrainingSettings(epochs=5, learning_rate=0.1))
    assert evaluate(network, data, data.test)[0] > 0.85
    images, labels = torch.from_numpy(data.inputs(data.test)), torch.from_numpy(data.test.labels_N)
    with torch.no_grad():
        passed = network.pass_gates(images, above(0.7))
    assert passed.decisions_BG[0].tolist() == [1, 0, 1]
    assert (passed.logits_EBC[0].argmax(1) == labels).float().mean() > 0.8
