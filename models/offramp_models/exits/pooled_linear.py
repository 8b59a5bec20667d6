"""The plainest exit of a convolutional network: average over the image, then one linear map.

Shapes: B = batch, D = channels, H, W = height and width, C = classes.
"""

import torch
from torch import nn

from offramp_models.shapes import ImageShape


class PooledLinear(nn.Module):
    """Classify a feature map by the mean of each channel.

    The cheapest head there is, so that asking early costs next to nothing (BranchyNet, https://arxiv.org/abs/1709.01686,
    puts larger ones on its side branches).

    Args:
        feature_shape: Channels D, height and width of the feature map.
        num_classes: Classes C.
    """

    def __init__(self, feature_shape: ImageShape, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(feature_shape[0], num_classes)

    def forward(self, features_BDHW: torch.Tensor) -> torch.Tensor:
        """Give the logits, float32, shape (B, C)."""
        logits_BC: torch.Tensor = self.linear(features_BDHW.mean(dim=(2, 3)))
        return logits_BC
