"""Small networks with gates, one for each way in which people write them.

Shapes: B = batch, D = features, H, W = height and width, C = classes, N = positions.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from offramp_models.gates import gate
from torch import nn
from torch.nn import functional

Join: TypeAlias = Callable[[torch.Tensor, nn.Module, torch.Tensor], torch.Tensor]

WIDTH = 8
CLASSES = 4


class Body(nn.Module):
    """A block's work."""

    def __init__(self, width: int = WIDTH, out: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width if out is None else out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x)) * 2


class Score(nn.Module):
    """A gate's score, (B, 1), spread over both sides of 0.5."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(4 * self.layer(x))


class Gated(nn.Module):
    """Two gated blocks; subclasses say how they are joined."""

    inputs = (WIDTH,)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.bodies = nn.ModuleList(Body() for _ in range(2))
        self.scores = nn.ModuleList(Score() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for body, score in zip(self.bodies, self.scores, strict=True):
            x = torch.relu(self.join(gate(score(x)), body, x))
        return self.head(x)

    def join(self, decision: torch.Tensor, body: nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class MulAdd(Gated):
    def join(self, decision: torch.Tensor, body: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x + decision * body(x)


def scaled(decision: torch.Tensor, body: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return body(x) * decision * 0.7 + x


def where(decision: torch.Tensor, body: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.where(decision > 0.5, body(x), x)


def lerp(decision: torch.Tensor, body: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return decision * body(x) + (1 - decision) * x


def torch_lerp(decision: torch.Tensor, body: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.lerp(x, body(x), decision)


def switched(decision: torch.Tensor, body: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Mix by two masks of one decision, as of a one-hot choice."""
    choice_B2 = torch.cat([1 - decision, decision], dim=1)
    return x * choice_B2[:, :1] + body(x) * choice_B2[:, 1:]


def averaged(decision: torch.Tensor, body: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Take the mean of an open block and its shortcut."""
    return (x + decision * body(x)) / (1 + decision)


def boolean(decision: torch.Tensor, body: nn.Module, x: torch.Tensor) -> torch.Tensor:
    is_shut = torch.logical_not(decision.bool())
    return torch.where(is_shut.expand_as(x), x, body(x) + x)


def filled(decision: torch.Tensor, body: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + body(x).masked_fill(decision < 0.5, 0.0)


def indexed(decision: torch.Tensor, body: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Spread the decision over a map and read one place of it."""
    mask_BD33 = decision[:, :, None, None].expand(-1, WIDTH, 3, 3)
    return x + mask_BD33[:, :, 0, 0] * body(x)


def channels(decision: torch.Tensor, body: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Mask channels by data, inside the body."""
    return x + decision * torch.sin(body(x) * (x > 0).float())


JOINS: tuple[Join, ...] = (*(scaled, where, lerp, torch_lerp, switched, averaged, boolean, filled, indexed, channels),)


class EveryJoin(Gated):
    """A block for each way of writing decision, body and shortcut in one line."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(Body() for _ in JOINS)
        self.scores = nn.ModuleList(Score() for _ in JOINS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for join, body, score in zip(JOINS, self.bodies, self.scores, strict=True):
            x = torch.tanh(join(gate(score(x), name=join.__name__), body, x))
        return self.head(x)


class Cheap(Gated):
    """Where a gate is shut, something cheap takes the body's place."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))

    def join(self, decision: torch.Tensor, body: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.where(decision > 0.5, body(x), x * self.scale)


class Concatenated(Gated):
    """What a shut gate leaves is no shortcut but zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * WIDTH, WIDTH)

    def join(self, decision: torch.Tensor, body: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.mix(torch.cat([x, decision * body(x)], dim=1))


class TwoMerges(Gated):
    """One gate, two values that it changes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = torch.relu(x)
        decision = gate(self.scores[0](x))
        hidden = self.bodies[0](x)
        x, y = x + decision * hidden, y + decision * self.bodies[1](hidden)
        return self.head(torch.sin(x) * torch.sigmoid(y))


class Reused(Gated):
    """One decision for two blocks, with and without trunk between them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        decision = gate(self.scores[0](x), name="both")
        x = torch.relu(x + decision * self.bodies[0](x))
        x = x + decision * self.bodies[1](x)
        x = x + decision * torch.sin(self.bodies[1](x))
        return self.head(x)


class Parallel(Gated):
    """Two independent gates with a norm that both bodies read."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        normed = self.norm(x)
        first, second = (gate(score(x)) for score in self.scores)
        return self.head(x + first * self.bodies[0](normed) + second * self.bodies[1](normed))


class SharedNorm(Gated):
    """A norm that a body behind two gates and one behind a third read; no gate alone could spare it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.scores = nn.ModuleList(Score() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        normed = self.norm(x)
        first, second, third = (gate(score(x)) for score in self.scores)
        return self.head(x + first * second * self.bodies[0](normed) + third * self.bodies[1](normed))


class Idle(Gated):
    """A gate whose decision comes to nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        idle, used = (gate(score(x), name=name) for score, name in zip(self.scores, ("idle", "used"), strict=True))
        x = x + idle * (used - used) * self.bodies[0](x)
        return self.head(torch.relu(x + used * self.bodies[1](x)))


class Central(Gated):
    """All scores from the input, before anything else runs."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores_BG = torch.sigmoid(4 * self.policy(x))
        x = self.stem(x)
        for index, body in enumerate(self.bodies):
            x = torch.relu(x + gate(scores_BG[:, index]).unsqueeze(1) * body(x))
        return self.head(x)


class Stacked(Gated):
    """Decisions put into one tensor and taken out of it again; it is counted and returned too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = [score(x).squeeze(1) for score in self.scores]
        decisions_BG = torch.stack([gate(score) for score in scores], dim=1)
        self.mean_depth = decisions_BG.mean()
        x = self.stem(x)
        for index, body in enumerate(self.bodies):
            x = x + decisions_BG[:, index, None] * body(x)
        return self.head(x)


class Recurrent(Gated):
    """One LSTM cell scores all gates and remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(WIDTH, 5), nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        state = None
        for body in self.bodies:
            state = self.cell(x, state)
            x = torch.relu(x + gate(torch.sigmoid(8 * self.out(state[0]))) * body(x))
        return self.head(x)


class WithExits(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.early = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(2))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.stem(x)
        exits = [self.early[0](torch.relu(x))]
        x = x + gate(self.scores[0](x)) * self.bodies[0](x)
        exits.append(self.early[1](x))
        x = x + gate(self.scores[1](x)) * self.bodies[1](x)
        return [*exits, self.head(x)]


class ExitIsMerge(Gated):
    """The gated part is the last thing in front of the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.correction = Body(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        logits = self.head(x)
        return logits + gate(self.scores[0](x)) * self.correction(x)


class Downsample(nn.Module):
    """Convolutions; the second block's shortcut does work of its own."""

    inputs = (2, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6))
        self.shortcut = nn.Conv2d(4, 6, 1, stride=2)
        self.scores = nn.ModuleList(Score(4) for _ in range(2))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        score_B111 = self.scores[0](x.mean((2, 3))).view(-1, 1, 1, 1)
        x = torch.relu(x + gate(score_B111) * self.first(x))
        decision_B1 = gate(self.scores[1](x.mean((2, 3))))
        x = self.shortcut(x) + decision_B1[:, :, None, None] * self.second(x)
        return self.head(torch.relu(x).mean((2, 3)))


class Nested(Gated):
    """A gate inside another's body, scored there."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        outer = gate(self.scores[0](x), name="outer")
        hidden = self.bodies[0](x)
        inner = gate(self.scores[1](hidden), name="inner")
        inside = torch.relu(hidden + inner * self.bodies[1](hidden))
        return self.head(x + outer * inside)


class NestedWhole(Gated):
    """The inner gate's shortcut is the outer's: one value stands for both."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        outer, inner = (gate(score(x)) for score in self.scores)
        body = torch.where(inner > 0.5, self.bodies[0](x), x)
        return self.head(torch.relu(torch.where(outer > 0.5, body, x)))


class NestedOther(Gated):
    """The inner gate's shortcut is not the outer's, and nothing stands between the two merges."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        outer, inner = (gate(score(x)) for score in self.scores)
        hidden = self.bodies[0](x)
        body = torch.where(inner > 0.5, self.bodies[1](hidden), hidden)
        return self.head(torch.relu(torch.where(outer > 0.5, body, x)))


class Product(Gated):
    """A body behind two gates at once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        both = gate(self.scores[0](x)) * gate(self.scores[1](x))
        x = torch.relu(both * self.bodies[0](x) + (1 - both) * x)
        return self.head(x)


class ScoredByProduct(Gated):
    """The second score is 0 where the first gate is shut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        first = gate(self.scores[0](x))
        x = torch.relu(x + first * self.bodies[0](x))
        second = gate(first * self.scores[1](x))
        x = torch.relu(x + second * self.bodies[1](x))
        return self.head(x)


class Priorities(Gated):
    """Which blocks run is the caller's choice."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("priorities", torch.tensor([0.9, 0.6]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for index, body in enumerate(self.bodies):
            decision_B = gate(self.priorities[index].expand(x.shape[0]), name=f"block_{index}")
            x = x + decision_B[:, None] * body(x)
        return self.head(x)


class Transformer(nn.Module):
    """One gate for attention, one for the MLP."""

    inputs = (5, WIDTH)

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.scores = nn.ModuleList(Score() for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + gate(self.scores[0](x.mean(1)))[:, :, None] * self.attend(self.norms[0](x))
        x = x + gate(self.scores[1](x.mean(1)))[:, :, None] * self.mlp(self.norms[1](x))
        return self.head(x.mean(1))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        heads = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.project(x).chunk(3, dim=-1))
        return self.out(functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class KnowsTheLast(Gated):
    """The second gate is scored by the first's decision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        first = gate(self.scores[0](x))
        x = torch.relu(x + first * self.bodies[0](x))
        second = gate(torch.sigmoid(self.scores[1](x) + first - 0.5))
        return self.head(x + second * self.bodies[1](x))


WAYS: tuple[type[nn.Module], ...] = (
    *(
        MulAdd,
        EveryJoin,
        Cheap,
        Concatenated,
        TwoMerges,
        Reused,
        Parallel,
        SharedNorm,
        Central,
        Stacked,
        Recurrent,
        WithExits,
    ),
    *(ExitIsMerge, Downsample, Nested, NestedWhole, NestedOther, Product, ScoredByProduct, Priorities, Transformer),
    KnowsTheLast,
)


class ReturnsEarly(Gated):
    """Leaves by a rule of its own between two gated blocks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + gate(self.scores[0](x)) * self.bodies[0](x)
        early = self.head(x)
        if early.softmax(1).max() > 0.4:
            return early
        x = x + gate(self.scores[1](x)) * self.bodies[1](x)
        return self.head(x)


class ReturnsEach(Gated):
    """Third-party style: a straight-through sum is the decision; a list of them comes back, shaped otherwise."""

    gates: tuple[str, ...] = ("out[1]",)

    def decide(self, score: torch.Tensor) -> torch.Tensor:
        hard = (score >= 0.5).float()
        return hard - score.detach() + score

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, object]:
        x = self.stem(x)
        decisions = []
        for body, score in zip(self.bodies, self.scores, strict=True):
            decision = self.decide(score(x))
            x = torch.relu(x + decision * body(x))
            decisions.append(decision.view(-1))
        return self.head(x), self.given(decisions)

    def given(self, decisions: list[torch.Tensor]) -> object:
        return decisions


class ReturnsStack(ReturnsEach):
    """The decisions come back as one integer tensor (B, G)."""

    def given(self, decisions: list[torch.Tensor]) -> object:
        return torch.stack(decisions, dim=1).round().long()

    def decide(self, score: torch.Tensor) -> torch.Tensor:
        return (score > 0.5).float().round()


class ReturnsPolicy(Gated):
    """A policy's decisions for all blocks, (B, G), are made and returned as one tensor, read column by column."""

    gates = ("out[1]",)

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        policy_BG = (torch.sigmoid(4 * self.policy(x)) > 0.5).float()
        x = self.stem(x)
        x = torch.relu(x + policy_BG[:, 0].view(-1, 1) * self.bodies[0](x))
        x = torch.relu(x + policy_BG[:, 1:2] * self.bodies[1](x))
        return self.head(x), policy_BG


class ReturnsBools(ReturnsEach):
    """What comes back is the comparison, made anew; what blocks are multiplied with is its float."""

    gates = ("out[1][0]", "out[1][1]")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, object]:
        x = self.stem(x)
        decisions = []
        for body, score in zip(self.bodies, self.scores, strict=True):
            scored = score(x)
            x = torch.relu(x + (scored > 0.5).float() * body(x))
            decisions.append(scored > 0.5)
        return self.head(x), decisions


RETURNING: tuple[type[nn.Module], ...] = (ReturnsEach, ReturnsStack, ReturnsPolicy, ReturnsBools)


class ReturnsScores(ReturnsEach):
    """What comes back are no decisions."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, object]:
        score = self.scores[0](self.stem(x))
        return self.head(self.stem(x) * (score > 0.5)), [score]


class ReturnsIdle(ReturnsEach):
    """What comes back decides about nothing."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, object]:
        x = self.stem(x)
        return self.head(x), [torch.sigmoid(self.scores[0](x)).gt(0.9)]


class Summed(Gated):
    """A weighted sum over both ways, which no constant can be seen through."""

    def join(self, decision: torch.Tensor, body: nn.Module, x: torch.Tensor) -> torch.Tensor:
        ways_B2D = torch.stack([x, body(x)], dim=1)
        return (ways_B2D * torch.cat([1 - decision, decision], dim=1).unsqueeze(2)).sum(1)


class SparesNothing(Gated):
    """Where the gate is open there is nothing to run."""

    def join(self, decision: torch.Tensor, body: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.where(decision > 0.5, x, body(x))


class EitherOpens(Gated):
    """A body behind one gate or the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        either = torch.maximum(gate(self.scores[0](x)), gate(self.scores[1](x)))
        return self.head(x + either * self.bodies[0](x))
