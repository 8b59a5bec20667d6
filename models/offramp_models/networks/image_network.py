"""What all networks for images have in common."""

from torch import nn


class ImageNetwork(nn.Module):
    """A multi-exit network for images; `forward` takes float32 (B, D, H, W), returns a list of logits.

    Attributes:
        input_shape: Channels, height and width of the images it takes.
    """

    input_shape: tuple[int, int, int]
