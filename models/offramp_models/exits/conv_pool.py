"""MSDNet's exit: two convolutions that halve the map, the average of what is left, then one linear map.

Shapes: B = batch, D = channels, H, W = height and width, C = classes.
"""

import torch
from torch import nn

from offramp_models.shapes import ImageShape

MAX_CHANNELS = 64
"""Channels of the convolutions in the paper; a narrower feature map is not widened."""


class ConvPool(nn.Module):
    """Classify a feature map with two 3x3 convolutions of stride 2, an average and a linear map.

    The classifier of MSDNet (https://arxiv.org/abs/1703.09844, appendix A) with the average over the whole of the map:
    the 2x2 pixels that are left of the paper's 8x8.

    Args:
        feature_shape: Channels D, height and width of the feature map.
        num_classes: Classes C.
    """

    def __init__(self, feature_shape: ImageShape, num_classes: int) -> None:
        super().__init__()
        channels = feature_shape[0]
        width = min(channels, MAX_CHANNELS)
        self.convolutions = nn.Sequential(*_halve(channels, width), *_halve(width, width))
        self.linear = nn.Linear(width, num_classes)

    def forward(self, features_BDHW: torch.Tensor) -> torch.Tensor:
        """Give the logits, float32, shape (B, C)."""
        logits_BC: torch.Tensor = self.linear(self.convolutions(features_BDHW).mean(dim=(2, 3)))
        return logits_BC


def _halve(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(out_channels), nn.ReLU()
