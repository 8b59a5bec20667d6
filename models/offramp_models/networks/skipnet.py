"""SkipNet: every residual block has a gate of its own, fed by what the block would read.

https://arxiv.org/abs/1711.09485
"""

from collections.abc import Sequence

from offramp_models.gates import make_gates
from offramp_models.networks.gated_resnet import GatedResNet
from offramp_models.shapes import ImageShape


class SkipNet(GatedResNet):
    """SkipNet: a gate before every residual block, feed-forward or recurrent, learnt with a policy gradient.

    The gates may share one LSTM cell, which makes them cheap and lets a later one know what the earlier ones saw. Train
    it with `hybrid_policy_gradient`. ResNet-38 (six blocks in each of three groups) unless told otherwise.

    Args:
        input_shape: Channels, height and width of the images.
        num_classes: Classes C.
        exits: One of `EXITS`.
        gates: One of `GATES`.
        widths: Channels of each group.
        blocks: Residual blocks in each group.
        num_exits: How many exits, the one at the end among them.

    Raises:
        ValueError: If there are no exits, or more than blocks.
    """

    def __init__(
        self,
        input_shape: ImageShape = (3, 32, 32),
        num_classes: int = 100,
        exits: str = "pooled_linear",
        *,
        gates: str = "recurrent",
        widths: Sequence[int] = (16, 32, 64),
        blocks: int = 6,
        num_exits: int = 1,
    ) -> None:
        super().__init__(
            input_shape, num_classes, exits, make_gates(gates), widths=widths, blocks=blocks, num_exits=num_exits
        )
