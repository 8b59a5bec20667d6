"""A transformer for images whose depth is the caller's choice: whole layers are dropped at random in training.

https://arxiv.org/abs/1909.11556

Shapes: B = batch, D = channels, H, W = height and width, P = patches, F = features of a patch, N = heads, G = layers,
each with a gate.
"""

from collections.abc import Sequence

import torch
from torch import nn

from offramp_models.exits import exit_head
from offramp_models.gates import HARD, FixedGates, GatedPass, GateNotes, Relaxation
from offramp_models.networks.gated_network import GatedNetwork, shares_of_flops
from offramp_models.shapes import ImageShape


class LayerDrop(GatedNetwork):
    """Transformer over an image's patches; LayerDrop makes how many of its layers answer the caller's choice.

    In training every layer is left out of a step with a probability of 1 - `kept_percent`/100, so that any subset
    of them learns to answer. In evaluation all gates are open at a threshold of 0.5, and raising it shuts layers by the
    paper's every-other rule, see `every_other`. With `kept_percent=100` this is the plain transformer, trained as any.

    Args:
        input_shape: Channels, height and width of the images.
        num_classes: Classes C.
        exits: One of `EXITS`; reads the last layer's patches as a feature map.
        depth: Layers.
        width: Features F of a patch. Wider: more accurate, slower.
        heads: Heads of the attention, which share the width.
        grid: Patches a side, at most. Finer: more accurate, slower.
        kept_percent: How often a layer takes part in a step. Lower: better with few layers, worse with all.

    Raises:
        ValueError: If the heads do not divide the width, or a layer would be kept more often than always.
    """

    def __init__(
        self,
        input_shape: ImageShape = (3, 32, 32),
        num_classes: int = 100,
        exits: str = "pooled_linear",
        *,
        depth: int = 12,
        width: int = 64,
        heads: int = 4,
        grid: int = 8,
        kept_percent: int = 80,
    ) -> None:
        super().__init__(input_shape, num_classes)
        if width % heads:
            raise ValueError(f"heads must divide the width, {width}; got {heads}")
        if not 1 <= kept_percent <= 100:
            raise ValueError(f"kept_percent must be 1 to 100; got {kept_percent}")
        self.patches = Patches(input_shape, width, grid)
        self.layers = nn.ModuleList(TransformerLayer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.exit = exit_head(exits)((width, *self.patches.size), num_classes)
        self.gates = FixedGates(priorities(depth), kept_G=[kept_percent / 100] * depth)
        num_patches = self.patches.size[0] * self.patches.size[1]
        self.gate_costs_G = shares_of_flops(self, [(layer, (num_patches, width)) for layer in self.layers])

    def pass_gates(self, images_BDHW: torch.Tensor, relax: Relaxation = HARD) -> GatedPass:
        """Send a batch through, and say what was decided on its way."""
        score, notes = self.gates.start(images_BDHW), GateNotes(relax)
        features_BPF = self.patches(images_BDHW)
        for index, layer in enumerate(self.layers):
            decision_B = notes.decide(score(features_BPF, index))
            features_BPF = features_BPF + decision_B[:, None, None] * layer(features_BPF)
        map_BFHW = self.norm(features_BPF).transpose(1, 2).unflatten(2, self.patches.size)
        return notes.finish([self.exit(map_BFHW)])


def priorities(depth: int) -> list[float]:
    """Give every layer's priority, above 0.5 and below 1: the order of `every_other`, the first to go the lowest."""
    priorities_G = [0.0] * depth
    for rank, layer in enumerate(every_other(range(depth)), start=1):
        priorities_G[layer] = 0.5 + 0.5 * rank / (depth + 1)
    return priorities_G


def every_other(layers: Sequence[int]) -> list[int]:
    """Give the order in which layers are dropped.

    The paper drops every k-th layer to be rid of one in k. One order holds that for every k that is a power of two:
    every other layer goes before the others do, and among both it is every other that goes first. The first layer is
    the last to go.
    """
    if len(layers) == 1:
        return list(layers)
    return every_other(layers[1::2]) + every_other(layers[::2])


class Patches(nn.Module):
    """Make features of the patches of a grid over the image; where a patch lies is learnt and added.

    A convolution reads the pixels before they are cut into patches, with which transformers learn by plain gradient
    descent (https://arxiv.org/abs/2106.14881).

    Attributes:
        size: Rows and columns of the grid.
    """

    def __init__(self, input_shape: ImageShape, width: int, grid: int) -> None:
        super().__init__()
        channels, height, image_width = input_shape
        sides = (-(-height // grid), -(-image_width // grid))
        self.size = (-(-height // sides[0]), -(-image_width // sides[1]))
        missing = (self.size[0] * sides[0] - height, self.size[1] * sides[1] - image_width)
        self.stem = nn.Sequential(
            nn.ZeroPad2d((0, missing[1], 0, missing[0])),
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, sides, stride=sides, bias=False),
            nn.BatchNorm2d(width),
        )
        self.place_PF = nn.Parameter(torch.randn(self.size[0] * self.size[1], width))

    def forward(self, images_BDHW: torch.Tensor) -> torch.Tensor:
        """Give the patches' features, shape (B, P, F)."""
        map_BFHW: torch.Tensor = self.stem(images_BDHW)
        return map_BFHW.flatten(2).transpose(1, 2) + self.place_PF


class TransformerLayer(nn.Module):
    """Attention over the patches, then a small network on each, both reading normalised features (pre-norm).

    Gives what the layer adds to its input, both parts together, so that one gate shuts it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.each = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BPF: torch.Tensor) -> torch.Tensor:
        """Give what is added to the input, shape (B, P, F)."""
        attended_BPF = self._attend(self.norm1(x_BPF))
        added_BPF: torch.Tensor = attended_BPF + self.each(self.norm2(x_BPF + attended_BPF))
        return added_BPF

    def _attend(self, x_BPF: torch.Tensor) -> torch.Tensor:
        query_key_value = self.query_key_value(x_BPF).unflatten(2, (3, self.heads, -1))
        query_BNPF, key_BNPF, value_BNPF = query_key_value.permute(2, 0, 3, 1, 4).unbind(0)
        likeness_BNPP = query_BNPF @ key_BNPF.transpose(2, 3) * query_BNPF.shape[3] ** -0.5
        mixed_BNPF = likeness_BNPP.softmax(dim=3) @ value_BNPF
        attended_BPF: torch.Tensor = self.project(mixed_BNPF.transpose(1, 2).flatten(2))
        return attended_BPF
