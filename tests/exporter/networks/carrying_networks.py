"""Small networks, each for one habit of what the later part of a network reads of the earlier."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, CLASSES = 6, 4


class Blocks(nn.Module):
    """Three blocks and three heads; the habits differ in what they do with them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.heads = nn.ModuleList([nn.Linear(WIDTH, CLASSES) for _ in range(3)])

    def features(self, x: Tensor) -> list[Tensor]:
        kept = []
        for block in self.blocks:
            x = block(x).relu()
            kept.append(x)
        return kept

    def exits(self, x: Tensor) -> list[Tensor]:
        return [head(h) for head, h in zip(self.heads, self.features(x), strict=True)]

    def forward(self, x: Tensor) -> Any:
        return self.exits(x)


class ListsOfScales(nn.Module):
    """Every layer keeps a fine and a coarse map; each exit looks at the coarse one."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.ModuleList([nn.Conv2d(1 if not k else 3, 3, 3, padding=1) for k in range(3)])
        self.coarse = nn.ModuleList([nn.Conv2d(3 if not k else 6, 3, 3, padding=1) for k in range(3)])
        self.heads = nn.ModuleList([nn.Linear(3, CLASSES) for _ in range(3)])

    def forward(self, image: Tensor) -> list[Tensor]:
        scales, exits = [image], []
        for fine, coarse, head in zip(self.fine, self.coarse, self.heads, strict=True):
            sharp = fine(scales[0]).relu()
            blurred = F.max_pool2d(sharp, 2)
            scales = [sharp, coarse(blurred if len(scales) == 1 else torch.cat([scales[1], blurred], 1)).relu()]
            exits.append(head(scales[1].mean((2, 3))))
        return exits


class NestedListsWithLongRange(Blocks):
    """The last block reads what the first wrote into a list of lists."""

    def forward(self, x: Tensor) -> list[Tensor]:
        kept: list[list[Tensor]] = []
        for block in self.blocks:
            x = block(x).relu()
            kept.append([x, x * 2])
        last = kept[0][1] + kept[2][0]
        return [self.heads[0](kept[0][0]), self.heads[1](kept[1][1]), self.heads[2](last)]


class EnsembleOfLogits(Blocks):
    """Each exit is the mean of all exits so far."""

    def forward(self, x: Tensor) -> list[Tensor]:
        exits = self.exits(x)
        return [torch.stack(exits[: k + 1]).mean(0) for k in range(len(exits))]


class EnsembleOfLogProbabilities(Blocks):
    """Each exit adds its log-probabilities, weighted, to those of all before."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        total, exits = torch.zeros(x.size(0), CLASSES), []
        for weight, logits in zip(self.weights, self.exits(x), strict=True):
            total = total + weight * logits.log_softmax(1)
            exits.append(total)
        return exits


class RecurrentState(nn.Module):
    """An LSTM whose state is carried from stage to stage."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.LSTM(3, 3, batch_first=True) for _ in range(2)])
        self.heads = nn.ModuleList([nn.Linear(3, CLASSES) for _ in range(2)])

    def forward(self, sequence: Tensor) -> list[Tensor]:
        state, exits = None, []
        for layer, head in zip(self.layers, self.heads, strict=True):
            sequence, state = layer(sequence, state)
            exits.append(head(sequence[:, -1]))
        return exits


class BothWays(nn.Module):
    """A two-layer LSTM that reads from both ends, whose last sizes torch.onnx leaves to be computed."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 2, num_layers=2, bidirectional=True, batch_first=True)
        self.more, self.heads = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, CLASSES) for _ in range(2)])

    def forward(self, sequence: Tensor) -> list[Tensor]:
        hidden, _ = self.lstm(sequence)
        return [self.heads[0](hidden[:, 0]), self.heads[1](self.more(hidden).relu().mean(1))]


class AttentionMaps(nn.Module):
    """The attention map of the first layer is used again by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(2))
        self.heads = nn.ModuleList([nn.Linear(4, CLASSES) for _ in range(2)])

    def forward(self, tokens: Tensor) -> list[Tensor]:
        hidden, attention = self.first(tokens, tokens, tokens)
        deeper, _ = self.second(hidden, hidden, hidden, need_weights=False)
        return [self.heads[0](hidden.mean(1)), self.heads[1]((attention @ deeper).mean(1))]


class TwoStreams(Blocks):
    """Two inputs, each with a stream of its own, that exchange features."""

    def forward(self, left: Tensor, right: Tensor) -> list[Tensor]:
        left, right = self.blocks[0](left).relu(), self.blocks[1](right).relu()
        early = self.heads[0](left + right)
        return [early, self.heads[1](self.blocks[2](left - right).relu() + right)]


class InputAgain(Blocks):
    """The last exit reads the input once more."""

    def forward(self, x: Tensor) -> list[Tensor]:
        exits = self.exits(x)
        return [*exits[:2], exits[2] + self.heads[0](x)]


class Counters(Blocks):
    """A counter decides which head is next, and another is a buffer that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> list[Tensor]:
        self.calls += 1
        self.seen += 1
        done, exits = 0, []
        while done < len(self.blocks):
            x = self.blocks[done](x).relu()
            exits.append(self.heads[done](x) / (done + 1))
            done += 1
        return exits
