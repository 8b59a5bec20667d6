"""SDN's exit: a mix of maximum and average, pooled to 4x4, then one linear map.

Shapes: B = batch, D = channels, H, W = height and width, C = classes.
"""

import torch
from torch import nn

from offramp_models.shapes import ImageShape

POOLED_SIZE = 4
"""Height and width after pooling: early features still say where in the image they were seen."""


class MixedPool(nn.Module):
    """Classify a feature map by maximum and average over a 4x4 grid, mixed in a proportion that is learned.

    The feature reduction of SDN's internal classifiers (https://arxiv.org/abs/1810.07052, section 4).

    Args:
        feature_shape: Channels D, height and width of the feature map.
        num_classes: Classes C.
    """

    def __init__(self, feature_shape: ImageShape, num_classes: int) -> None:
        super().__init__()
        channels, *size_HW = feature_shape
        (kernel_H, padding_H, cells_H), (kernel_W, padding_W, cells_W) = map(_windows, size_HW)
        kernel_HW, padding_HW = (kernel_H, kernel_W), (padding_H, padding_W)
        self.maximum = nn.MaxPool2d(kernel_HW, padding=padding_HW)
        self.average = nn.AvgPool2d(kernel_HW, padding=padding_HW, count_include_pad=False)
        self.mix = nn.Parameter(torch.zeros(()))
        self.linear = nn.Linear(channels * cells_H * cells_W, num_classes)

    def forward(self, features_BDHW: torch.Tensor) -> torch.Tensor:
        """Give the logits, float32, shape (B, C)."""
        share = torch.sigmoid(self.mix)
        pooled_BDHW = share * self.maximum(features_BDHW) + (1 - share) * self.average(features_BDHW)
        logits_BC: torch.Tensor = self.linear(pooled_BDHW.flatten(1))
        return logits_BC


def _windows(size: int) -> tuple[int, int, int]:
    """Give the side of windows that part a side of the map into (about) four, the padding, and how many there are."""
    kernel = -(-size // POOLED_SIZE)
    padding = (-size % kernel + 1) // 2
    return kernel, padding, (size + 2 * padding) // kernel
