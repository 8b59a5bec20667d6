"""The residual network for small images, with exits spread over its blocks.

Shapes: B = batch, D = channels, H, W = height and width, C = classes.
"""

from collections.abc import Sequence

from torch import nn

from offramp_models.exits import exit_head
from offramp_models.networks.image_network import ChainedNetwork
from offramp_models.networks.residual import ResidualBlock
from offramp_models.shapes import ImageShape


class ResNet(ChainedNetwork):
    """ResNet for small images (ResNet-20 unless told otherwise), exits spread evenly over its blocks.

    A 3x3 convolution, then groups of residual blocks, each group at half the size of the one before
    (https://arxiv.org/abs/1512.03385, section 4.2). Widths that double where sizes halve make all blocks cost about the
    same, so that exits spread over the blocks are spread over the cost, as in SDN (https://arxiv.org/abs/1810.07052).

    Args:
        input_shape: Channels, height and width of the images.
        num_classes: Classes C.
        exits: One of `EXITS`; SDN's unless told otherwise.
        widths: Channels of each group. Wider: more accurate, slower.
        blocks: Residual blocks in each group.
        num_exits: How many exits, the one at the end among them.

    Raises:
        ValueError: If there is no group, or there are more exits than blocks.
    """

    def __init__(
        self,
        input_shape: ImageShape = (3, 32, 32),
        num_classes: int = 100,
        exits: str = "mixed_pool",
        *,
        widths: Sequence[int] = (16, 32, 64),
        blocks: int = 3,
        num_exits: int = 5,
    ) -> None:
        super().__init__(input_shape, num_classes)
        num_blocks = blocks * len(widths)
        if not 1 <= num_exits <= num_blocks:
            raise ValueError(f"num_exits must be 1 to {num_blocks}, the number of blocks; got {num_exits}")
        ends = {num_blocks * (index + 1) // num_exits for index in range(num_exits)}
        channels, height, width = widths[0], *input_shape[1:]
        self.stem = nn.Sequential(
            nn.Conv2d(input_shape[0], channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.stages, self.exits = nn.ModuleList(), nn.ModuleList()
        stage: list[nn.Module] = []
        for index in range(num_blocks):
            group, stride = index // blocks, 2 if index % blocks == 0 < index else 1
            stage.append(ResidualBlock(channels, widths[group], stride))
            channels, height, width = widths[group], -(-height // stride), -(-width // stride)
            if index + 1 in ends:
                self.stages.append(nn.Sequential(*stage))
                self.exits.append(exit_head(exits)((channels, height, width), num_classes))
                stage = []
