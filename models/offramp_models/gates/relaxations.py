"""How gates decide while they learn: each relaxation makes log-odds into decisions that a gradient can pass.

A gate's score is the logistic function of its log-odds. What serves is always the hard decision, `gate(score)`;
a relaxation stands in for it during training.

Shapes: B = batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch.nn import functional

from offramp_models.gates.operator import gate
from offramp_models.lookup import look_up


@dataclass(frozen=True, slots=True)
class Choice:
    """What was decided at one gate.

    Attributes:
        decision_B: What the body is multiplied with.
        log_prob_B: Logarithm of the probability that it was drawn with; None where a gradient passes the decision.
    """

    decision_B: torch.Tensor
    log_prob_B: torch.Tensor | None = None


class Relaxation(Protocol):
    """Decides at a gate."""

    def __call__(self, log_odds_B: torch.Tensor, gate_index: int) -> Choice:
        """Decide.

        Args:
            log_odds_B: The gate's log-odds to be open, shape (B,).
            gate_index: Which gate it is, counted from 0 in the order in which they decide.
        """
        ...


@dataclass(frozen=True, slots=True)
class StraightThrough:
    """The hard decision that also serves; its gradient is handed to the score (https://arxiv.org/abs/1308.3432)."""

    def __call__(self, log_odds_B: torch.Tensor, gate_index: int) -> Choice:
        """Decide."""
        return Choice(gate(torch.sigmoid(log_odds_B), name=f"gate_{gate_index}"))


@dataclass(frozen=True, slots=True)
class GumbelSoftmax:
    """A hard draw with the gradient of a soft one (survey eq. 21, 22; https://arxiv.org/abs/1611.01144).

    Of two classes, open and shut, each gets Gumbel noise; the larger wins, and the gradient is that of their softmax.

    Attributes:
        temperature: Of the softmax. Lower: a gradient closer to the draw, and of higher variance.
    """

    temperature: float = 1.0

    def __call__(self, log_odds_B: torch.Tensor, gate_index: int) -> Choice:
        """Draw."""
        noise_B = _gumbel(log_odds_B) - _gumbel(log_odds_B)
        soft_B = torch.sigmoid((log_odds_B + noise_B) / self.temperature)
        return Choice(_hard_forward((soft_B >= 0.5).to(soft_B.dtype), soft_B))


@dataclass(frozen=True, slots=True)
class SemanticHashing:
    """Improved semantic hashing (https://arxiv.org/abs/1801.09797): noise before a sigmoid that saturates.

    Half of the rows, drawn anew each time, go on with the soft decision, half with the hard one; the gradient is that
    of the soft one for all.
    """

    def __call__(self, log_odds_B: torch.Tensor, gate_index: int) -> Choice:
        """Draw."""
        noisy_B = log_odds_B + torch.randn_like(log_odds_B)
        soft_B = (1.2 * torch.sigmoid(noisy_B) - 0.1).clamp(0, 1)
        hard_B = _hard_forward((noisy_B >= 0).to(soft_B.dtype), soft_B)
        is_hard_B = torch.randperm(len(log_odds_B), device=log_odds_B.device) < len(log_odds_B) // 2
        return Choice(torch.where(is_hard_B, hard_B, soft_B))


@dataclass(frozen=True, slots=True)
class Sampled:
    """A draw with the score as its probability; no gradient passes it, its log-probability is kept (REINFORCE)."""

    def __call__(self, log_odds_B: torch.Tensor, gate_index: int) -> Choice:
        """Draw."""
        decision_B = torch.bernoulli(torch.sigmoid(log_odds_B.detach()))
        return Choice(decision_B, functional.logsigmoid(torch.where(decision_B > 0.5, log_odds_B, -log_odds_B)))


HARD: Relaxation = StraightThrough()

RELAXATIONS: Mapping[str, Relaxation] = MappingProxyType(
    {"gumbel": GumbelSoftmax(), "semantic_hashing": SemanticHashing(), "straight_through": HARD}
)
"""Those that a gradient passes; the methods that teach without one draw by themselves."""


def relaxation(name: str) -> Relaxation:
    """Give the relaxation of a name.

    Raises:
        ValueError: If there is none of that name; the message lists those there are.
    """
    return look_up(RELAXATIONS, "gate relaxation", name)


def _gumbel(like: torch.Tensor) -> torch.Tensor:
    """Draw from the Gumbel distribution, -ln(-ln u) with u uniform; an exponential variate is -ln u, and never 0."""
    return -torch.empty_like(like).exponential_().log()


def _hard_forward(hard_B: torch.Tensor, soft_B: torch.Tensor) -> torch.Tensor:
    """Give the hard values exactly, with the gradient of the soft ones."""
    return hard_B + (soft_B - soft_B.detach())
