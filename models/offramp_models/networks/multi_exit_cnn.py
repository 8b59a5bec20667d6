"""A residual network for small images with an exit behind every stage.

The backbone is that of ResNet (https://arxiv.org/abs/1512.03385) with its widths and depths left to the caller; the
exits are trained jointly with it, as in BranchyNet (https://arxiv.org/abs/1709.01686).

Shapes: B = batch, D = channels, H, W = height and width, C = classes.
"""

from collections.abc import Sequence

from torch import nn

from offramp_models.exits import exit_head
from offramp_models.networks.image_network import ChainedNetwork
from offramp_models.networks.residual import ResidualBlock
from offramp_models.shapes import ImageShape


class MultiExitCNN(ChainedNetwork):
    """Classify small images, with an answer after every stage.

    The defaults are for 8x8 grey images of ten classes. The first stages are narrow and see little of the image (survey
    eq. 7), so that their exits are cheap and right on the easy images alone; the last two hold 80 % of the work.

    Args:
        input_shape: Channels, height and width of the images.
        num_classes: Classes C.
        exits: One of `EXITS`.
        widths: Channels of each stage.
        blocks: Residual blocks of each stage.
        strides: By how much each stage shrinks the feature map.
        upscale: The stem spreads every pixel over this many squared; tiny images need room for the strides to shrink.

    Raises:
        ValueError: If widths, blocks and strides differ in number, or the strides shrink the image to nothing.
    """

    def __init__(
        self,
        input_shape: ImageShape = (1, 8, 8),
        num_classes: int = 10,
        exits: str = "pooled_linear",
        *,
        widths: Sequence[int] = (20, 32, 48, 96),
        blocks: Sequence[int] = (4, 2, 3, 4),
        strides: Sequence[int] = (1, 1, 1, 2),
        upscale: int = 2,
    ) -> None:
        super().__init__(input_shape, num_classes)
        if not len(widths) == len(blocks) == len(strides) or not widths:
            raise ValueError("widths, blocks and strides need one number per stage each")
        self.stem = _stem(input_shape[0], widths[0], upscale)
        self.stages, self.exits = nn.ModuleList(), nn.ModuleList()
        channels, (height, width) = widths[0], (size * upscale for size in input_shape[1:])
        for stage_width, num_blocks, stride in zip(widths, blocks, strides, strict=True):
            if min(height, width) < stride:
                raise ValueError(
                    f"images of {input_shape[1]}x{input_shape[2]} pixels are too small for strides {tuple(strides)}"
                )
            self.stages.append(_stage(channels, stage_width, num_blocks, stride))
            channels, height, width = stage_width, -(-height // stride), -(-width // stride)
            self.exits.append(exit_head(exits)((channels, height, width), num_classes))


def _stem(in_channels: int, out_channels: int, upscale: int) -> nn.Sequential:
    first: nn.Module = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    if upscale > 1:
        first = nn.ConvTranspose2d(in_channels, out_channels, upscale, stride=upscale, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(out_channels), nn.ReLU())


def _stage(in_channels: int, width: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = ResidualBlock(in_channels, width, stride)
    return nn.Sequential(first, *(ResidualBlock(width, width, 1) for _ in range(num_blocks - 1)))
