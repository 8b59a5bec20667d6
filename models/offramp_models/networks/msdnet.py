"""The multi-scale dense network: coarse features from the first layer on, so that early exits have what they need.

Features of S scales are computed side by side, each scale at half the height and width of the one before. Exits read
the coarsest alone.

Shapes: B = batch, D = channels, H, W = height and width, S = scales, finest first.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from offramp_models.exits import exit_head
from offramp_models.networks.image_network import ImageNetwork
from offramp_models.shapes import ImageShape


class MSDNet(ImageNetwork):
    """Multi-scale dense network: features of all scales from the first layer on, exits on the coarsest.

    Every layer adds channels to every scale, read from the scale itself and from the next finer one. The layers are
    split into as many blocks as there are scales; the last layer of a block drops the finest scale, and the channels of
    the others are halved (https://arxiv.org/abs/1703.09844, section 4 and appendix A).

    Args:
        input_shape: Channels, height and width of the images.
        num_classes: Classes C.
        exits: One of `EXITS`; the paper's unless told otherwise.
        num_scales: Scales S, from the image's own size down.
        channels: Channels of the finest scale after the first layer; each coarser scale has twice as many.
        growth: Channels that a layer adds to the finest scale; each coarser scale gets twice as many. More: more
            accurate, slower.
        bottleneck: A layer's 3x3 convolutions read at most this many times the channels that they add.
        first_exit: Layers before the first exit.
        spacing: Layers from one exit to the next.
        num_exits: How many exits.

    Raises:
        ValueError: If the images are too small for the scales, or there are fewer layers than scales.
    """

    def __init__(
        self,
        input_shape: ImageShape = (3, 32, 32),
        num_classes: int = 100,
        exits: str = "conv_pool",
        *,
        num_scales: int = 3,
        channels: int = 8,
        growth: int = 12,
        bottleneck: int = 4,
        first_exit: int = 1,
        spacing: int = 1,
        num_exits: int = 6,
    ) -> None:
        super().__init__(input_shape, num_classes)
        _, height, width = input_shape
        if min(height, width) < 2 ** (num_scales - 1):
            raise ValueError(f"images of {height}x{width} pixels are too small for {num_scales} scales")
        num_layers = first_exit + spacing * (num_exits - 1)
        if num_layers < num_scales:
            raise ValueError(f"{num_scales} scales need at least as many layers; there are {num_layers}")
        shrunk = 2 ** (num_scales - 1)
        coarsest_size = (-(-height // shrunk), -(-width // shrunk))
        channels_S = [channels * 2**scale for scale in range(num_scales)]
        growth_S = [growth * 2**scale for scale in range(num_scales)]
        self.stem = FirstLayer(input_shape[0], channels_S)
        self.stages, self.exits = nn.ModuleList(), nn.ModuleList()
        stage: list[nn.Module] = []
        for index in range(1, num_layers + 1):
            ends_block = index in _block_ends(num_layers, num_scales)
            layer = DenseLayer(channels_S, growth_S[-len(channels_S) :], bottleneck, drops_finest=ends_block)
            stage.append(layer)
            channels_S = layer.channels_S
            if ends_block:
                stage.append(Reduction(channels_S))
                channels_S = [width // 2 for width in channels_S]
            if index >= first_exit and (index - first_exit) % spacing == 0:
                self.stages.append(nn.Sequential(*stage))
                self.exits.append(exit_head(exits)((channels_S[-1], *coarsest_size), num_classes))
                stage = []

    def forward(self, images_BDHW: torch.Tensor) -> list[torch.Tensor]:
        """Give every exit's logits, each float32 of shape (B, C), the earliest first."""
        features_S = self.stem(images_BDHW)
        logits_EBC = []
        for stage, head in zip(self.stages, self.exits, strict=True):
            features_S = stage(features_S)
            logits_EBC.append(head(features_S[-1]))
        return logits_EBC


def _block_ends(num_layers: int, num_blocks: int) -> set[int]:
    """Give the layers, counted from 1, that end a block other than the last."""
    return {num_layers * block // num_blocks for block in range(1, num_blocks)}


class FirstLayer(nn.Module):
    """Make the features of all scales: of the image at its own size, then each from the one before."""

    def __init__(self, in_channels: int, channels_S: Sequence[int]) -> None:
        super().__init__()
        strides_S = [1] + [2] * (len(channels_S) - 1)
        self.scales = nn.ModuleList(
            _convolution(before, after, 3, stride)
            for (before, after), stride in zip(pairwise([in_channels, *channels_S]), strides_S, strict=True)
        )

    def forward(self, images_BDHW: torch.Tensor) -> list[torch.Tensor]:
        """Give one feature map per scale, finest first."""
        features_S = []
        features_BDHW = images_BDHW
        for scale in self.scales:
            features_BDHW = scale(features_BDHW)
            features_S.append(features_BDHW)
        return features_S


class DenseLayer(nn.Module):
    """Add channels to every scale; a layer that drops the finest scale reads it for the last time.

    Attributes:
        channels_S: How many channels each scale has behind it.
    """

    def __init__(
        self, channels_S: Sequence[int], growth_S: Sequence[int], bottleneck: int, *, drops_finest: bool
    ) -> None:
        super().__init__()
        self.finest = 1 if drops_finest else 0
        scales = range(self.finest, len(channels_S))
        self.channels_S = [channels_S[scale] + growth_S[scale] for scale in scales]
        self.scales = nn.ModuleList(
            GrownScale(channels_S[scale], channels_S[scale - 1] if scale else 0, growth_S[scale], bottleneck)
            for scale in scales
        )

    def forward(self, features_S: list[torch.Tensor]) -> list[torch.Tensor]:
        """Give the features of every scale that is kept."""
        return [
            grow(features_S[scale], features_S[scale - 1] if scale else None)
            for scale, grow in enumerate(self.scales, start=self.finest)
        ]


class GrownScale(nn.Module):
    """Put new channels behind a scale's old ones: half of them read the next finer scale, if there is one."""

    def __init__(self, channels: int, finer_channels: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        from_finer = growth // 2 if finer_channels else 0
        self.own = _squeezed(channels, growth - from_finer, bottleneck)
        self.finer = _squeezed(finer_channels, from_finer, bottleneck, stride=2) if finer_channels else None

    def forward(self, own_BDHW: torch.Tensor, finer_BDHW: torch.Tensor | None) -> torch.Tensor:
        """Give the scale's features, the new channels last."""
        parts = [own_BDHW, self.own(own_BDHW)]
        if self.finer is not None:
            parts.append(self.finer(finer_BDHW))
        return torch.cat(parts, dim=1)


class Reduction(nn.Module):
    """Halve the channels of every scale with a 1x1 convolution."""

    def __init__(self, channels_S: Sequence[int]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(_convolution(channels, channels // 2, 1) for channels in channels_S)

    def forward(self, features_S: list[torch.Tensor]) -> list[torch.Tensor]:
        """Give the features of the same scales."""
        return [scale(features_BDHW) for scale, features_BDHW in zip(self.scales, features_S, strict=True)]


def _squeezed(in_channels: int, out_channels: int, bottleneck: int, stride: int = 1) -> nn.Sequential:
    narrow = bottleneck * out_channels
    if narrow >= in_channels:
        return _convolution(in_channels, out_channels, 3, stride)
    return nn.Sequential(*_convolution(in_channels, narrow, 1), *_convolution(narrow, out_channels, 3, stride))


def _convolution(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())
