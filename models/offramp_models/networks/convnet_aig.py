"""ConvNet-AIG: residual blocks whose gates learn by Gumbel-softmax to open at a given rate.

https://arxiv.org/abs/1711.11503
"""

from collections.abc import Sequence
from typing import ClassVar

from offramp_models.gates import FeedForwardGates
from offramp_models.networks.gated_resnet import GatedResNet
from offramp_models.shapes import ImageShape


class ConvNetAIG(GatedResNet):
    """ConvNet-AIG: a gate before every residual block, each for itself, learnt to open at a target rate.

    Its gates draw by Gumbel-softmax while they learn. Train it with `target_rate`. ResNet-38 (six blocks in each of
    three groups) unless told otherwise.

    Args:
        input_shape: Channels, height and width of the images.
        num_classes: Classes C.
        exits: One of `EXITS`.
        widths: Channels of each group.
        blocks: Residual blocks in each group.
        num_exits: How many exits, the one at the end among them.

    Raises:
        ValueError: If there are no exits, or more than blocks.
    """

    relaxation: ClassVar[str] = "gumbel"

    def __init__(
        self,
        input_shape: ImageShape = (3, 32, 32),
        num_classes: int = 100,
        exits: str = "pooled_linear",
        *,
        widths: Sequence[int] = (16, 32, 64),
        blocks: int = 6,
        num_exits: int = 1,
    ) -> None:
        super().__init__(
            input_shape, num_classes, exits, FeedForwardGates, widths=widths, blocks=blocks, num_exits=num_exits
        )
