"""BlockDrop: a small network looks at the image once and decides about all blocks of a residual network up front.

https://arxiv.org/abs/1711.08393

Shapes: B = batch, D = channels, H, W = height and width, G = gates.
"""

from collections.abc import Sequence

import torch
from torch import nn

from offramp_models.gates import Gates, Scorer
from offramp_models.gates.scoring import OPEN_LOG_ODDS
from offramp_models.networks.gated_resnet import GatedResNet
from offramp_models.networks.residual import ResidualBlock
from offramp_models.shapes import ImageShape


class BlockDrop(GatedResNet):
    """BlockDrop: a residual network and a policy network, which decides about every block before the first one runs.

    Train it with `curriculum_policy_gradient`. ResNet-38 (six blocks in each of three groups) unless told otherwise.

    Args:
        input_shape: Channels, height and width of the images.
        num_classes: Classes C.
        exits: One of `EXITS`.
        widths: Channels of each group.
        blocks: Residual blocks in each group.
        num_exits: How many exits, the one at the end among them.
        policy_width: Channels that the policy network starts with. Wider: a better choice of blocks, at a cost that
            every image pays.

    Raises:
        ValueError: If there are no exits, or more than blocks.
    """

    def __init__(
        self,
        input_shape: ImageShape = (3, 32, 32),
        num_classes: int = 100,
        exits: str = "pooled_linear",
        *,
        widths: Sequence[int] = (16, 32, 64),
        blocks: int = 6,
        num_exits: int = 1,
        policy_width: int = 8,
    ) -> None:
        def make_gates(channels_G: Sequence[int]) -> Gates:
            return PolicyNetwork(input_shape[0], policy_width, len(channels_G))

        super().__init__(input_shape, num_classes, exits, make_gates, widths=widths, blocks=blocks, num_exits=num_exits)


class PolicyNetwork(Gates):
    """Score all gates at once from the image: a small residual network that halves the map three times, then a mean.

    Args:
        in_channels: Channels of the images.
        width: Channels of its first map; two residual blocks double them.
        num_gates: Gates G.
    """

    def __init__(self, in_channels: int, width: int, num_gates: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            ResidualBlock(width, 2 * width, 2),
            ResidualBlock(2 * width, 4 * width, 2),
        )
        self.output = nn.Linear(4 * width, num_gates)
        nn.init.constant_(self.output.bias, OPEN_LOG_ODDS)

    def start(self, images_BDHW: torch.Tensor) -> Scorer:
        """Give what scores: every answer is known before the first question."""
        log_odds_BG: torch.Tensor = self.output(self.features(images_BDHW).mean(dim=(2, 3)))
        return lambda _, gate_index: log_odds_BG[:, gate_index]
