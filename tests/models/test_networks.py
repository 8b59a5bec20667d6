import pytest
import torch
from offramp_models import NETWORKS, create_network
from offramp_models.networks import MultiExitCNN


def small(**changes):
    return MultiExitCNN(**({"widths": (4, 6, 8), "blocks": (1, 1, 2), "strides": (1, 2, 2)} | changes)).eval()


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_forward_gives_one_tensor_of_logits_per_exit_in_order(batch):
    logits = small(num_classes=7)(torch.rand(batch, 1, 8, 8))
    assert [tuple(one.shape) for one in logits] == [(batch, 7)] * 3


def test_colour_images_of_another_size_need_only_other_arguments():
    network = small(in_channels=3, image_size=32, upscale=1)
    assert network.input_shape == (3, 32, 32)
    assert [tuple(one.shape) for one in network(torch.rand(2, 3, 32, 32))] == [(2, 10)] * 3


def test_a_row_gets_the_same_logits_alone_as_in_a_batch():
    network = small()
    images = torch.rand(5, 1, 8, 8)
    together = network(images)
    for row in range(5):
        alone = network(images[row : row + 1])
        for exit_together, exit_alone in zip(together, alone, strict=True):
            torch.testing.assert_close(exit_together[row : row + 1], exit_alone, atol=1e-5, rtol=1e-5)


def test_a_later_exit_reads_what_an_earlier_stage_computed():
    network = small()
    before = network(torch.ones(1, 1, 8, 8))
    torch.nn.init.normal_(network.stages[0][0].conv1.weight, std=2.0)
    after = network(torch.ones(1, 1, 8, 8))
    assert all(not torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_an_exit_does_not_depend_on_later_stages():
    network = small()
    images = torch.rand(2, 1, 8, 8)
    before = network(images)
    torch.nn.init.zeros_(network.stages[2][0].conv1.weight)
    after = network(images)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[2], after[2])


@pytest.mark.parametrize("changes", [{"widths": (4, 6)}, {"widths": (), "blocks": (), "strides": ()}])
def test_stages_described_unevenly_are_refused(changes):
    with pytest.raises(ValueError, match="one number per stage"):
        small(**changes)


def test_images_too_small_for_the_strides_are_refused():
    with pytest.raises(ValueError, match="too small"):
        small(image_size=2, upscale=1, strides=(2, 2, 2))


def test_networks_built_from_one_seed_are_equal_and_from_two_are_not():
    one, same, other = (create_network("multi_exit_cnn", seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_building_a_network_leaves_the_random_state_of_the_caller_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    create_network("multi_exit_cnn", seed=5)
    assert torch.equal(torch.rand(1), expected)


def test_an_unknown_network_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="multi_exit_cnn"):
        create_network("resnet9000")


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_runs_on_the_images_it_says_it_takes(name):
    network = create_network(name).eval()
    logits = network(torch.rand(2, *network.input_shape))
    assert len(logits) >= 2
    assert all(one.shape == logits[0].shape for one in logits)
