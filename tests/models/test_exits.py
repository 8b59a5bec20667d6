import numpy as np
import pytest
import torch
from offramp_models.exits import EXITS, ConvPool, MixedPool, PooledLinear, exit_head


@pytest.mark.parametrize("name", sorted(EXITS))
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 14, 16, 28, 32])
def test_every_head_reads_maps_of_every_size(name, size):
    head = EXITS[name]((6, size, size + 1), 5).eval()
    assert head(torch.rand(3, 6, size, size + 1)).shape == (3, 5)


def test_an_unknown_head_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="exits 'magic' is not one of conv_pool, mixed_pool, pooled_linear"):
        exit_head("magic")


def test_pooled_linear_maps_the_mean_of_each_channel():
    head, features = PooledLinear((3, 4, 5), 2), torch.rand(2, 3, 4, 5)
    expected = features.mean(dim=(2, 3)) @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(features), expected)


@pytest.mark.parametrize("mix", [-30.0, 0.0, 1.0, 30.0])
def test_mixed_pool_mixes_maximum_and_average_over_a_grid_of_four_by_four(mix):
    head, features = MixedPool((2, 8, 8), 3), torch.randn(5, 2, 8, 8)
    torch.nn.init.constant_(head.mix, mix)
    windows = features.reshape(5, 2, 4, 2, 4, 2).permute(0, 1, 2, 4, 3, 5).flatten(4)
    share = 1 / (1 + np.exp(-mix))
    pooled = share * windows.amax(-1) + (1 - share) * windows.mean(-1)
    expected = pooled.flatten(1) @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(features), expected)


def test_mixed_pool_learns_how_to_mix():
    head = MixedPool((2, 8, 8), 3)
    head(torch.randn(5, 2, 8, 8)).square().sum().backward()
    assert head.mix.grad != 0


@pytest.mark.parametrize("size", [7, 14])
def test_padding_of_a_map_that_four_does_not_divide_changes_neither_average_nor_maximum(size):
    head = MixedPool((1, size, size), 3)
    constant = torch.full((1, 1, size, size), -2.5)
    torch.testing.assert_close(head.maximum(constant), torch.full((1, 1, 4, 4), -2.5))
    torch.testing.assert_close(head.average(constant), torch.full((1, 1, 4, 4), -2.5))


@pytest.mark.parametrize(("channels", "width"), [(16, 16), (200, 64)])
def test_conv_pool_halves_the_map_twice_and_is_no_wider_than_need_be(channels, width):
    head = ConvPool((channels, 8, 8), 3).eval()
    assert head.convolutions(torch.rand(1, channels, 8, 8)).shape == (1, width, 2, 2)
