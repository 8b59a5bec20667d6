"""DDI, dual dynamic inference: an image chooses the blocks it needs, and in each block the channels.

https://arxiv.org/abs/1907.04523

Shapes: B = batch, D = channels, H, W = height and width, F = features of the gates' cell, G = gates.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from offramp_models.gates import HARD, GatedPass, GateNotes, RecurrentGates, Relaxation
from offramp_models.gates.scoring import CellState
from offramp_models.networks.gated_resnet import GatedResNet
from offramp_models.shapes import ImageShape

OPEN_CHANNEL_LOG_ODDS = 0.2
"""Where channels start: less surely open than blocks (0.85), or only blocks would be shut to meet a budget."""


class DDI(GatedResNet):
    """DDI: one LSTM cell opens blocks, and channels between the two convolutions of each block.

    A block's gate spares its body; a shut channel is multiplied with 0 inside the body, whose convolutions are computed
    whole: what it would spare where channels are skipped too is counted in the loss alone. Train it with `resource`, to
    a budget. ResNet-38 (six blocks in each of three groups) unless told otherwise.

    Args:
        input_shape: Channels, height and width of the images.
        num_classes: Classes C.
        exits: One of `EXITS`.
        widths: Channels of each group.
        blocks: Residual blocks in each group.
        num_exits: How many exits, the one at the end among them.
        cell_width: Features F of the cell.

    Raises:
        ValueError: If there are no exits, or more than blocks.
    """

    gates: "DualGates"

    def __init__(
        self,
        input_shape: ImageShape = (3, 32, 32),
        num_classes: int = 100,
        exits: str = "pooled_linear",
        *,
        widths: Sequence[int] = (16, 32, 64),
        blocks: int = 6,
        num_exits: int = 1,
        cell_width: int = 10,
    ) -> None:
        def make_gates(channels_G: Sequence[int]) -> DualGates:
            return DualGates(channels_G, [width for width in widths for _ in range(blocks)], cell_width)

        super().__init__(input_shape, num_classes, exits, make_gates, widths=widths, blocks=blocks, num_exits=num_exits)

    def pass_gates(self, images_BDHW: torch.Tensor, relax: Relaxation = HARD) -> GatedPass:
        """Send a batch through, and say what was decided on its way; channels are always decided hard."""
        notes, state_BF = GateNotes(relax), None
        features_BDHW = self.stem(images_BDHW)
        logits_EBC: list[torch.Tensor] = []
        shares_GB = []
        for index, block in enumerate(self.blocks):
            state_BF = self.gates.step(features_BDHW, index, state_BF)
            decision_B, open_BD = notes.decide(self.gates.log_odds(state_BF)), self.gates.open_channels(state_BF, index)
            features_BDHW = block(features_BDHW, decision_B, open_BD)
            shares_GB.append(open_BD.mean(dim=1))
            if index in self.exit_ends:
                logits_EBC.append(self.exits[len(logits_EBC)](features_BDHW))
        return replace(notes.finish(logits_EBC), shares_BG=torch.stack(shares_GB, dim=1))


class DualGates(RecurrentGates):
    """Gates of blocks and of channels, read off one LSTM cell.

    Args:
        channels_G: Channels of what each block reads.
        hidden_G: Channels between each block's convolutions.
        cell_width: Features F of the cell.
    """

    def __init__(self, channels_G: Sequence[int], hidden_G: Sequence[int], cell_width: int) -> None:
        super().__init__(channels_G, cell_width)
        heads = [nn.Linear(cell_width, channels) for channels in hidden_G]
        for head in heads:
            nn.init.constant_(head.bias, OPEN_CHANNEL_LOG_ODDS)
        self.channels = nn.ModuleList(heads)

    def open_channels(self, state_BF: CellState, index: int) -> torch.Tensor:
        """Give 1 for every channel of a block that is open and 0 for those shut, shape (B, D); straight-through."""
        score_BD = torch.sigmoid(self.channels[index](state_BF[0]))
        open_BD = (score_BD >= 0.5).to(score_BD.dtype)
        return open_BD + (score_BD - score_BD.detach()) if self.training else open_BD
