import json
from itertools import pairwise

import pytest
import torch
from offramp_models.exits import EXITS
from offramp_models.networks import NETWORKS, MSDNet, MultiExitCNN, NetworkPlan, ResNet, create_network, plan_network
from offramp_models.networks.residual import Projection
from torch import nn

CIFAR, GREY = ((3, 32, 32), 100), ((1, 28, 28), 10)
TINY_RESNET = {"widths": (4, 6, 8), "blocks": 2}
GATED = {"blockdrop", "convnet_aig", "ddi", "layerdrop", "skipnet", "stochastic_depth"}
TINY = {
    "blockdrop": TINY_RESNET | {"policy_width": 2},
    "convnet_aig": TINY_RESNET,
    "ddi": TINY_RESNET,
    "layerdrop": {"depth": 2, "width": 8, "heads": 2, "grid": 4},
    "msdnet": {"channels": 2, "growth": 2, "num_exits": 4},
    "multi_exit_cnn": {"widths": (4, 6, 8), "blocks": (1, 1, 2), "strides": (1, 2, 2), "upscale": 1},
    "resnet": TINY_RESNET | {"num_exits": 4},
    "skipnet": TINY_RESNET,
    "stochastic_depth": TINY_RESNET,
}


def small(**changes):
    return MultiExitCNN(**({"widths": (4, 6, 8), "blocks": (1, 1, 2), "strides": (1, 2, 2)} | changes)).eval()


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_forward_gives_one_tensor_of_logits_per_exit_in_order(batch):
    logits = small(num_classes=7)(torch.rand(batch, 1, 8, 8))
    assert [tuple(one.shape) for one in logits] == [(batch, 7)] * 3


def test_colour_images_of_another_size_need_only_other_arguments():
    network = small(input_shape=(3, 32, 32), upscale=1)
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
        small(input_shape=(1, 2, 2), upscale=1, strides=(2, 2, 2))


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
    assert len(logits) >= (1 if name in GATED else 2)
    assert all(one.shape == logits[0].shape for one in logits)


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("exits", sorted(EXITS))
@pytest.mark.parametrize(("shape", "num_classes"), [CIFAR, GREY, ((3, 17, 22), 5)])
def test_every_network_is_built_for_a_data_set_with_every_kind_of_exit(name, exits, shape, num_classes):
    network = create_network(name, exits=exits, input_shape=shape, num_classes=num_classes, knobs=TINY[name]).eval()
    assert (network.input_shape, network.num_classes) == (shape, num_classes)
    logits = network(torch.rand(2, *shape))
    assert len(logits) >= (1 if name in GATED else 3)
    assert all(one.shape == (2, num_classes) for one in logits)


def flops_of_exits(network):
    """Count the multiply-adds (as two) of convolutions and linear maps until each exit."""
    counted, until_exit = [0], []

    def count(module, _, output):
        if isinstance(module, nn.Conv2d | nn.Linear):
            counted[0] += 2 * output[0].numel() * module.weight[0].numel()

    for module in network.modules():
        module.register_forward_hook(count)
    for head in network.exits:
        head.register_forward_hook(lambda *_: until_exit.append(counted[0]))
    network.eval()(torch.zeros(1, *network.input_shape))
    return until_exit


@pytest.mark.parametrize("name", ["msdnet", "resnet"])
@pytest.mark.parametrize(("shape", "num_classes"), [CIFAR, GREY])
def test_exits_are_spread_over_the_cost_and_the_first_is_cheap(name, shape, num_classes):
    flops = flops_of_exits(create_network(name, input_shape=shape, num_classes=num_classes))
    shares = [one / flops[-1] for one in flops]
    assert 4 <= len(shares) <= 6
    assert 0.05 < shares[0] < 0.18
    assert max(late - early for early, late in pairwise(shares)) < 0.26
    assert 25e6 < flops[-1] < 90e6


def test_resnet_spreads_its_exits_over_the_blocks_and_halves_the_map_at_each_group():
    network = ResNet((3, 32, 32), 7, "pooled_linear", widths=(4, 8, 16), blocks=3, num_exits=5)
    assert [len(stage) for stage in network.stages] == [1, 2, 2, 2, 2]
    features, shapes = network.stem(torch.rand(1, 3, 32, 32)), []
    for stage in network.stages:
        for block in stage:
            features = block(features)
            shapes.append(tuple(features.shape[1:]))
    assert shapes == [(4, 32, 32)] * 3 + [(8, 16, 16)] * 3 + [(16, 8, 8)] * 3


def scales_of(network, images):
    """Give the shapes of every scale, finest first: behind the first layer, then behind each stage."""
    features = network.stem(images)
    shapes = [[tuple(one.shape[1:]) for one in features]]
    for stage in network.stages:
        features = stage(features)
        shapes.append([tuple(one.shape[1:]) for one in features])
    return shapes


def test_msdnet_makes_all_scales_at_once_and_drops_one_with_each_block():
    network = MSDNet((3, 32, 32), 7, channels=4, growth=2, num_exits=6)
    assert scales_of(network, torch.rand(1, 3, 32, 32)) == [
        [(4, 32, 32), (8, 16, 16), (16, 8, 8)],
        [(6, 32, 32), (12, 16, 16), (24, 8, 8)],
        [(8, 16, 16), (16, 8, 8)],  # the finest scale is dropped, (16, 32) channels are halved
        [(12, 16, 16), (24, 8, 8)],
        [(16, 8, 8)],
        [(24, 8, 8)],
        [(32, 8, 8)],
    ]


def test_msdnets_coarse_features_read_the_finer_scale_and_never_the_reverse():
    network = MSDNet((1, 28, 28), 7, channels=4, growth=2).eval()
    layer = network.stages[0][0]
    features = [torch.rand(1, one.shape[1], *one.shape[2:]) for one in network.stem(torch.rand(1, 1, 28, 28))]
    before = layer(features)
    for scale in range(3):
        changed = list(features)
        changed[scale] = changed[scale] + 1.0
        differs = [not torch.equal(one, other) for one, other in zip(before, layer(changed), strict=True)]
        assert differs == [index in (scale, scale + 1) for index in range(3)]


def test_every_weight_of_a_network_has_a_part_in_some_exit():
    for name in NETWORKS:
        network = create_network(name, knobs=TINY[name])
        sum(logits.square().sum() for logits in network(torch.rand(4, *network.input_shape))).backward()
        assert [key for key, weight in network.named_parameters() if weight.grad is None] == []


def test_a_plan_survives_its_json_and_builds_the_same_network():
    plan = plan_network("resnet", exits="conv_pool", input_shape=(1, 28, 28), num_classes=10, knobs={"widths": [4, 8]})
    written = json.loads(json.dumps({"seconds": 3} | plan.to_json()))
    assert written["knobs"] == {"widths": [4, 8], "blocks": 3, "num_exits": 5}
    again = NetworkPlan.from_record(written)
    assert again == plan
    one, other = plan.build(4).state_dict(), again.build(4).state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_record_of_something_else_holds_no_plan():
    assert NetworkPlan.from_record({"epochs": 3, "network": "mine"}) is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"network": "vgg"},
            "network 'vgg' is not one of blockdrop, convnet_aig, ddi, layerdrop, msdnet, multi_exit_cnn, resnet",
        ),
        ({"exits": "magic"}, "exits 'magic' is not one of conv_pool, mixed_pool, pooled_linear"),
        ({"input_shape": [3, 32]}, "input_shape must be channels, height and width"),
        ({"input_shape": [3, 32, 0]}, "input_shape must be whole numbers from 1 to 8192; got 0"),
        ({"num_classes": "ten"}, "num_classes must be whole numbers"),
        ({"num_classes": [10]}, "num_classes must be a whole number"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"knobs": {"depth": 3}}, "network 'resnet' has no knob 'depth'; it has blocks, num_exits, widths"),
        ({"knobs": {"blocks": True}}, "blocks must be whole numbers from 1 to 8192; got True"),
        ({"knobs": {"blocks": 10**9}}, "blocks must be whole numbers from 1 to 8192"),
        ({"knobs": {"blocks": [2, 2]}}, "blocks must be one whole number, such as 3; got 2,2"),
        ({"knobs": {"widths": 8}}, "widths must be a row of whole numbers, such as 16,32,64; got 8"),
        ({"knobs": {"widths": []}}, "widths must be 1 to 64 numbers; got 0"),
        ({"knobs": {"blocks": 1}}, "num_exits must be 1 to 3, the number of blocks; got 5"),
    ],
)
def test_a_record_that_no_training_wrote_is_refused_by_its_field(changes, sentence):
    record = plan_network("resnet").to_json() | changes
    with pytest.raises(ValueError, match=sentence):
        NetworkPlan.from_record(record).build()


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"num_scales": 7}, "images of 32x32 pixels are too small for 7 scales"),
        ({"num_exits": 2}, "3 scales need at least as many layers; there are 2"),
    ],
)
def test_an_msdnet_that_cannot_be_is_refused(knobs, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_network("msdnet", knobs=knobs)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_projection_learns_from_what_it_serves(stride):
    project = Projection(4, 6, stride)
    x_BDHW = torch.randn(5, 4, 8, 7)
    served = project.eval()(x_BDHW)
    torch.testing.assert_close(project.train()(x_BDHW), served)
