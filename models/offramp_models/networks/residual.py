"""The block that residual networks are made of.

Shapes: B = batch, D = channels, H, W = height and width.
"""

import torch
from torch import nn
from torch.nn import functional


class Projection(nn.Conv2d):
    """A 1x1 convolution that takes one pixel of every `stride` x `stride`.

    While it learns, the pixels are taken first. It is the same sum, but the gradient of a strided 1x1 convolution over
    fewer than 8 channels is written past its end on processors without AVX-512 (oneDNN in PyTorch 2.13), and the
    process aborts.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x_BDHW: torch.Tensor) -> torch.Tensor:
        """Give the projected map, height and width divided by the stride, rounded up."""
        if not self.training:
            return super().forward(x_BDHW)
        down, across = self.stride
        return functional.conv2d(x_BDHW[:, :, ::down, ::across], self.weight)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to their input (a 1x1 convolution of it where shapes differ).

    The basic block of ResNet, https://arxiv.org/abs/1512.03385
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels or stride != 1:
            project = Projection(in_channels, out_channels, stride)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(out_channels))

    def body(self, x_BDHW: torch.Tensor, open_BD: torch.Tensor | None = None) -> torch.Tensor:
        """Give what is added to the shortcut: all that a shut gate saves."""
        hidden_BDHW = functional.relu(self.norm1(self.conv1(x_BDHW)))
        if open_BD is not None:
            hidden_BDHW = open_BD[:, :, None, None] * hidden_BDHW
        added_BDHW: torch.Tensor = self.norm2(self.conv2(hidden_BDHW))
        return added_BDHW

    def forward(
        self, x_BDHW: torch.Tensor, decision_B: torch.Tensor | None = None, open_BD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Give the block's feature map; height and width are divided by the stride.

        Args:
            x_BDHW: The features.
            decision_B: A gate's decision for each row: 1 adds the body to the shortcut, 0 leaves it out. None: it is
                added.
            open_BD: 1 for every channel between the convolutions that is open and 0 for those shut. None: all are.
        """
        added_BDHW = self.body(x_BDHW, open_BD)
        if decision_B is not None:
            added_BDHW = decision_B[:, None, None, None] * added_BDHW
        return functional.relu(self.shortcut(x_BDHW) + added_BDHW)
