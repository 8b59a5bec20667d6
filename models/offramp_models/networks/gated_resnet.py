"""A residual network for small images with a gate before every block.

Shapes: B = batch, D = channels, H, W = height and width, C = classes, E = exits, G = gates.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from offramp_models.exits import exit_head
from offramp_models.gates import HARD, GatedPass, GateNotes, Gates, Relaxation
from offramp_models.networks.gated_network import Body, GatedNetwork, shares_of_flops
from offramp_models.networks.residual import ResidualBlock
from offramp_models.shapes import ImageShape


class GatedResNet(GatedNetwork):
    """ResNet for small images, each of whose blocks runs if its gate opens, with exits if asked for.

    A shut gate leaves the block's shortcut alone. Subclasses say what scores the gates.

    Args:
        input_shape: Channels, height and width of the images.
        num_classes: Classes C.
        exits: One of `EXITS`.
        make_gates: Makes the gates, given the channels of what each block reads.
        widths: Channels of each group.
        blocks: Residual blocks in each group.
        num_exits: How many exits, the one at the end among them, spread evenly over the blocks.

    Raises:
        ValueError: If there are no exits, or more than blocks.
    """

    def __init__(
        self,
        input_shape: ImageShape,
        num_classes: int,
        exits: str,
        make_gates: Callable[[Sequence[int]], Gates],
        *,
        widths: Sequence[int],
        blocks: int,
        num_exits: int = 1,
    ) -> None:
        super().__init__(input_shape, num_classes)
        num_blocks = blocks * len(widths)
        if not 1 <= num_exits <= num_blocks:
            raise ValueError(f"num_exits must be 1 to {num_blocks}, the number of blocks; got {num_exits}")
        self.exit_ends = tuple(num_blocks * (index + 1) // num_exits - 1 for index in range(num_exits))
        shape = (widths[0], *input_shape[1:])
        self.stem = nn.Sequential(
            nn.Conv2d(input_shape[0], widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        self.blocks, self.exits = nn.ModuleList(), nn.ModuleList()
        bodies_G: list[Body] = []
        for index in range(num_blocks):
            group, stride = index // blocks, 2 if index % blocks == 0 < index else 1
            block = ResidualBlock(shape[0], widths[group], stride)
            self.blocks.append(block)
            bodies_G.append((block.body, shape))
            shape = (widths[group], -(-shape[1] // stride), -(-shape[2] // stride))
            if index in self.exit_ends:
                self.exits.append(exit_head(exits)(shape, num_classes))
        self.gates = make_gates([channels for _, (channels, *_) in bodies_G])
        self.gate_costs_G = shares_of_flops(self, bodies_G)

    def pass_gates(self, images_BDHW: torch.Tensor, relax: Relaxation = HARD) -> GatedPass:
        """Send a batch through, and say what was decided on its way."""
        score, notes = self.gates.start(images_BDHW), GateNotes(relax)
        features_BDHW = self.stem(images_BDHW)
        logits_EBC: list[torch.Tensor] = []
        for index in range(len(self.blocks)):
            features_BDHW = self.run_block(index, features_BDHW, notes.decide(score(features_BDHW, index)))
            if index in self.exit_ends:
                logits_EBC.append(self.exits[len(logits_EBC)](features_BDHW))
        return notes.finish(logits_EBC)

    def run_block(self, index: int, features_BDHW: torch.Tensor, decision_B: torch.Tensor) -> torch.Tensor:
        """Send features through a block whose gate has decided."""
        result_BDHW: torch.Tensor = self.blocks[index](features_BDHW, decision_B)
        return result_BDHW
