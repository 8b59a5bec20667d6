"""What networks for images have in common.

Shapes: B = batch, D = channels, H, W = height and width, C = classes.
"""

import torch
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


class ChainedNetwork(ImageNetwork):
    """Stages one behind the other, each with an exit; subclasses fill them.

    Attributes:
        stem: What the images go through first.
        stages: What makes feature maps of feature maps.
        exits: As many heads, each reading its stage's feature map.
    """

    stem: nn.Module
    stages: nn.ModuleList
    exits: nn.ModuleList

    def forward(self, images_BDHW: torch.Tensor) -> list[torch.Tensor]:
        """Give every exit's logits, each float32 of shape (B, C), the earliest first."""
        features_BDHW = self.stem(images_BDHW)
        logits_EBC = []
        for stage, head in zip(self.stages, self.exits, strict=True):
            features_BDHW = stage(features_BDHW)
            logits_EBC.append(head(features_BDHW))
        return logits_EBC
