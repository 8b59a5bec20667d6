"""Stochastic depth: a residual network whose blocks are left out at random in training, the deep ones more often.

https://arxiv.org/abs/1603.09382

Shapes: B = batch, D = channels, H, W = height and width, G = gates, one for each block.
"""

from collections.abc import Sequence

import torch

from offramp_models.gates import FixedGates, Gates
from offramp_models.networks.gated_resnet import GatedResNet
from offramp_models.shapes import ImageShape


class StochasticDepth(GatedResNet):
    """Residual network with stochastic depth; how many blocks answer a request is the caller's choice.

    In training a block takes part in a step with its survival probability, see `survival_probabilities`. In evaluation
    what it adds is scaled by that probability, and all gates are open at a threshold of 0.5: a gate's score lies
    halfway between its survival probability and 1, so that raising the threshold shuts the deepest block first. With
    `survival_percent=100` it is trained as `resnet` with one exit is. ResNet-38 (six blocks in each of three groups)
    unless told otherwise.

    Args:
        input_shape: Channels, height and width of the images.
        num_classes: Classes C.
        exits: One of `EXITS`.
        widths: Channels of each group.
        blocks: Residual blocks in each group.
        num_exits: How many exits, the one at the end among them.
        survival_percent: How often the last block takes part in a step. Lower: better with few blocks, and less
            overfitting; slower to learn.

    Raises:
        ValueError: If there are no exits, or more than blocks, or a block would survive more often than always.
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
        survival_percent: int = 50,
    ) -> None:
        if not 1 <= survival_percent <= 100:
            raise ValueError(f"survival_percent must be 1 to 100; got {survival_percent}")
        survival_G = survival_probabilities(blocks * len(widths), survival_percent / 100)
        self.survival_G = survival_G

        def make_gates(_: Sequence[int]) -> Gates:
            return FixedGates([(1 + survival) / 2 for survival in survival_G], kept_G=survival_G)

        super().__init__(input_shape, num_classes, exits, make_gates, widths=widths, blocks=blocks, num_exits=num_exits)

    def run_block(self, index: int, features_BDHW: torch.Tensor, decision_B: torch.Tensor) -> torch.Tensor:
        """Send features through a block; in evaluation it adds what it added on average in training (eq. 5)."""
        scale = 1.0 if self.training else self.survival_G[index]
        return super().run_block(index, features_BDHW, scale * decision_B)


def survival_probabilities(num_blocks: int, last: float) -> tuple[float, ...]:
    """Give how often each block takes part: falls linearly with depth to that of the last block (the paper's eq. 4)."""
    return tuple(1 - (1 - last) * (index + 1) / num_blocks for index in range(num_blocks))
