"""A residual network for small images with an exit behind every stage.

The backbone is that of ResNet (https://arxiv.org/abs/1512.03385) with its widths and depths left to the caller; the
exits are trained jointly with it, as in BranchyNet (https://arxiv.org/abs/1709.01686).

Shapes: B = batch, D = channels, H, W = height and width, C = classes.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from offramp_models.exits import PooledLinear
from offramp_models.networks.image_network import ImageNetwork


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to their input (a 1x1 convolution of it where shapes differ)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels or stride != 1:
            project = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(out_channels))

    def forward(self, x_BDHW: torch.Tensor) -> torch.Tensor:
        """Give the block's feature map; height and width are divided by the stride."""
        hidden_BDHW = functional.relu(self.norm1(self.conv1(x_BDHW)))
        return functional.relu(self.shortcut(x_BDHW) + self.norm2(self.conv2(hidden_BDHW)))


class MultiExitCNN(ImageNetwork):
    """Classify small images, with an answer after every stage.

    The defaults are for 8x8 grey images of ten classes. The first stages are narrow and see little of the image (survey
    eq. 7), so that their exits are cheap and right on the easy images alone; the last two hold 80 % of the work.

    Args:
        in_channels: 1 for grey images, 3 for colour.
        image_size: Height and width of the images, in pixels.
        widths: Channels of each stage.
        blocks: Residual blocks of each stage.
        strides: By how much each stage shrinks the feature map.
        num_classes: Classes C.
        upscale: The stem spreads every pixel over this many squared; tiny images need room for the strides to shrink.

    Raises:
        ValueError: If widths, blocks and strides differ in number, or the strides shrink the image to nothing.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        image_size: int = 8,
        widths: Sequence[int] = (20, 32, 48, 96),
        blocks: Sequence[int] = (4, 2, 3, 4),
        strides: Sequence[int] = (1, 1, 1, 2),
        num_classes: int = 10,
        upscale: int = 2,
    ) -> None:
        super().__init__()
        if not len(widths) == len(blocks) == len(strides) or not widths:
            raise ValueError("widths, blocks and strides need one number per stage each")
        self.input_shape = (in_channels, image_size, image_size)
        self.stem = _stem(in_channels, widths[0], upscale)
        self.stages = nn.ModuleList()
        self.exits = nn.ModuleList()
        channels, size = widths[0], image_size * upscale
        for width, num_blocks, stride in zip(widths, blocks, strides, strict=True):
            if size < stride:
                raise ValueError(f"images of {image_size} pixels are too small for strides {tuple(strides)}")
            self.stages.append(_stage(channels, width, num_blocks, stride))
            self.exits.append(PooledLinear(width, num_classes))
            channels, size = width, -(-size // stride)

    def forward(self, images_BDHW: torch.Tensor) -> list[torch.Tensor]:
        """Give every exit's logits, each float32 of shape (B, C), the earliest first."""
        features_BDHW = self.stem(images_BDHW)
        logits_EBC = []
        for stage, exit_head in zip(self.stages, self.exits, strict=True):
            features_BDHW = stage(features_BDHW)
            logits_EBC.append(exit_head(features_BDHW))
        return logits_EBC


def _stem(in_channels: int, out_channels: int, upscale: int) -> nn.Sequential:
    first: nn.Module = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    if upscale > 1:
        first = nn.ConvTranspose2d(in_channels, out_channels, upscale, stride=upscale, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(out_channels), nn.ReLU())


def _stage(in_channels: int, width: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = ResidualBlock(in_channels, width, stride)
    return nn.Sequential(first, *(ResidualBlock(width, width, 1) for _ in range(num_blocks - 1)))
