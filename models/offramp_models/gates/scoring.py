"""What scores the gates of a network: one module holds them all, since some share weights and state.

Shapes: B = batch, D = channels, H, W = height and width, G = gates.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import nn

from offramp_models.lookup import look_up

OPEN_LOG_ODDS = 1.7346
"""Where gates start: open with probability 0.85, as in ConvNet-AIG, so that blocks learn before they are skipped."""

Scorer: TypeAlias = Callable[[torch.Tensor, int], torch.Tensor]
"""Scores one batch on its way: features (B, D, H, W) or (B, D) and the gate's index, in order, to log-odds (B,)."""


class Gates(nn.Module, ABC):
    """All gates of a network."""

    @abstractmethod
    def start(self, images_BDHW: torch.Tensor) -> Scorer:
        """Give what scores a batch's way through the network.

        Args:
            images_BDHW: The network's input.
        """


class FeedForwardGates(Gates):
    """Every gate by itself: average over the map, a small hidden layer, one number (survey eq. 13).

    The gate of ConvNet-AIG (https://arxiv.org/abs/1711.11503, section 3.2); of its two classes only the difference
    counts.

    Args:
        channels_G: Channels of what each gate reads.
        hidden: Width of the hidden layer.
    """

    def __init__(self, channels_G: Sequence[int], hidden: int = 16) -> None:
        super().__init__()
        self.gates = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), _one_number(hidden)) for channels in channels_G
        )

    def start(self, images_BDHW: torch.Tensor) -> Scorer:
        """Give what scores; it keeps nothing between gates."""
        return self._score

    def _score(self, features: torch.Tensor, gate_index: int) -> torch.Tensor:
        log_odds_B1: torch.Tensor = self.gates[gate_index](_pooled(features))
        return log_odds_B1.squeeze(1)


class RecurrentGates(Gates):
    """One LSTM cell shared by all gates, which remembers what it saw before the earlier blocks.

    SkipNet's recurrent gate (https://arxiv.org/abs/1711.09485, section 3.1): the average over the map, brought to the
    cell's width by a linear map of each gate's own.

    Args:
        channels_G: Channels of what each gate reads.
        hidden: Width of the cell.
    """

    def __init__(self, channels_G: Sequence[int], hidden: int = 10) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(nn.Linear(channels, hidden) for channels in channels_G)
        self.cell = nn.LSTMCell(hidden, hidden)
        self.output = _one_number(hidden)

    def start(self, images_BDHW: torch.Tensor) -> Scorer:
        """Give what scores; it carries the cell's state from gate to gate."""
        state_BH: CellState | None = None

        def score(features: torch.Tensor, gate_index: int) -> torch.Tensor:
            nonlocal state_BH
            state_BH = self.step(features, gate_index, state_BH)
            return self.log_odds(state_BH)

        return score

    def step(self, features: torch.Tensor, gate_index: int, state_BH: "CellState | None") -> "CellState":
        """Give the cell's state behind a gate, from that behind the gate before; None before the first."""
        state: CellState = self.cell(self.inputs[gate_index](_pooled(features)), state_BH)
        return state

    def log_odds(self, state_BH: "CellState") -> torch.Tensor:
        """Read a gate's log-odds off the cell's state, shape (B,)."""
        log_odds_B1: torch.Tensor = self.output(state_BH[0])
        return log_odds_B1.squeeze(1)


CellState: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""An LSTM cell's output and its memory, each of shape (B, H)."""


MakeGates: TypeAlias = Callable[[Sequence[int]], Gates]
"""Makes a network's gates, given the channels of what each reads."""

GATES: Mapping[str, MakeGates] = MappingProxyType({"feed_forward": FeedForwardGates, "recurrent": RecurrentGates})


def make_gates(name: str) -> MakeGates:
    """Give what makes the gates of a name.

    Raises:
        ValueError: If there are no gates of that name; the message lists those there are.
    """
    return look_up(GATES, "gates", name)


def _pooled(features: torch.Tensor) -> torch.Tensor:
    return features if features.dim() == 2 else features.mean(dim=(2, 3))


def _one_number(width: int) -> nn.Linear:
    linear = nn.Linear(width, 1)
    nn.init.constant_(linear.bias, OPEN_LOG_ODDS)
    return linear
