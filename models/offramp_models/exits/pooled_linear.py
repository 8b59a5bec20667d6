"""The plainest exit of a convolutional network: average over the image, then one linear map.

Shapes: B = batch, D = channels, H, W = height and width, C = classes.
"""

import torch
from torch import nn


class PooledLinear(nn.Module):
    """Classify a feature map by the mean of each channel.

    The cheapest head there is, so that asking early costs next to nothing (BranchyNet, https://arxiv.org/abs/1709.01686,
    puts larger ones on its side branches; SDN, https://arxiv.org/abs/1810.07052, mixes maximum and average).

    Args:
        num_channels: Channels D of the feature map.
        num_classes: Classes C.
    """

    def __init__(self, num_channels: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_channels, num_classes)

    def forward(self, features_BDHW: torch.Tensor) -> torch.Tensor:
        """Give the logits, float32, shape (B, C)."""
        logits_BC: torch.Tensor = self.linear(features_BDHW.mean(dim=(2, 3)))
        return logits_BC
