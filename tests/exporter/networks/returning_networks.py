"""Small networks, each for one habit of where exits are kept and how `forward` gives them back."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from carrying_networks import CLASSES, WIDTH, Blocks
from torch import Tensor, nn


class HeadsLast(Blocks):
    """All blocks, then all heads, from the last to the first."""

    def forward(self, x: Tensor) -> list[Tensor]:
        kept = self.features(x)
        return [self.heads[k](kept[k]) for k in (2, 1, 0)][::-1]


class KeepingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.scores: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x).relu()
        self.scores = self.head(x)
        return x


class LayersKeepTheirOutputs(nn.Module):
    """Layers store their scores as attributes; forward collects them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[KeepingBlock() for _ in range(3)])

    def forward(self, x: Tensor) -> list[Tensor | None]:
        self.layers(x)
        return [layer.scores for layer in self.layers]


class OnlyTheFinalIsReturned(LayersKeepTheirOutputs):
    """Layers store their scores as attributes; forward returns the last answer alone."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.layers(x)
        return self.layers[2].scores  # type: ignore[return-value]


class Hooks(Blocks):
    """Forward hooks fill a dict, and forward reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            block.register_forward_hook(self._keep(index))

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            del module, inputs
            self.kept[index] = output

        return hook

    def forward(self, x: Tensor) -> list[Tensor]:
        self.features(x)
        return [head(self.kept[index]) for index, head in enumerate(self.heads)]


class Enough(Exception):
    """Carries the exits."""

    def __init__(self, exits: list[Tensor]) -> None:
        super().__init__("seen enough")
        self.exits = exits


class StopsByAnException(Blocks):
    """A hook stops the run where it has seen enough; what it throws carries the exits."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        for block in self.blocks:
            block.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.kept.append(self.heads[len(self.kept)](output))
        if len(self.kept) == 2:
            raise Enough(self.kept)

    def forward(self, x: Tensor) -> list[Tensor] | None:
        self.kept = []
        try:
            self.features(x)
        except Enough as enough:
            return enough.exits
        return None


class StackedInFront(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.exits(x))


class StackedBehindTheBatch(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([exit_.unsqueeze(1) for exit_ in self.exits(x)], dim=1).log_softmax(-1)


class StackedAndTurned(Blocks):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": (torch.stack(self.exits(x)) / 2.0).transpose(0, 1)}


class FinalFirst(Blocks):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        early, middle, final = self.exits(x)
        return final, early, middle


class DeepestFirst(Blocks):
    def forward(self, x: Tensor) -> list[Tensor]:
        return self.exits(x)[::-1]


class Tasks(Blocks):
    """Nested [exit][task]; the tasks have as many classes."""

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        return [[exit_, -exit_ + 1] for exit_ in self.exits(x)]


class Dict(Blocks):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return dict(zip(("early", "middle", "late"), self.exits(x), strict=True))


@dataclass
class Answer:
    logits: list[Tensor]
    features: list[Tensor]
    gates: Tensor
    rejections: list[Tensor]
    depth: int
    extra: None = None


class MuchBeside(Blocks):
    """Logits beside features, gate probabilities, rejection scores, a number and None."""

    def forward(self, x: Tensor) -> Answer:
        kept = self.features(x)
        gates = torch.cat([h.mean(1, keepdim=True) for h in kept], 1).softmax(1)
        rejections = [h.amax(1, keepdim=True).sigmoid() for h in kept]
        logits = [head(h) for head, h in zip(self.heads, kept, strict=True)]
        return Answer(logits, kept, gates, rejections, len(kept))


class Both(NamedTuple):
    logits: Tensor
    probabilities: Tensor


class ProbabilitiesBeside(Blocks):
    """Each exit as logits and as their softmax."""

    def forward(self, x: Tensor) -> list[Both]:
        return [Both(exit_, exit_.softmax(1)) for exit_ in self.exits(x)]


class Probabilities(Blocks):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [exit_.softmax(1) for exit_ in self.exits(x)]


class LogProbabilities(Blocks):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [exit_.log_softmax(1) for exit_ in self.exits(x)]


class Widths(Blocks):
    """The first exit knows two groups, the last four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.heads[0] = nn.Linear(WIDTH, 2)
