"""What all networks for images have in common."""

from torch import nn

from offramp_models.shapes import ImageShape


class ImageNetwork(nn.Module):
    """A multi-exit network for images; `forward` takes float32 (B, D, H, W), returns a list of logits.

    Attributes:
        input_shape: Channels, height and width of the images it takes.
        num_classes: Classes that it tells apart.

    Raises:
        ValueError: If the images or the classes are none.
    """

    def __init__(self, input_shape: ImageShape, num_classes: int) -> None:
        super().__init__()
        if len(input_shape) != 3 or min(input_shape) < 1:
            raise ValueError(f"input_shape must be channels, height and width, each at least 1; got {input_shape}")
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2; got {num_classes}")
        self.input_shape = input_shape
        self.num_classes = num_classes
