"""What comes of a batch that went through gates, and the notes that are taken on its way.

Shapes: B = batch, C = classes, E = exits, G = gates in the order in which they decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from offramp_models.gates.relaxations import Choice, Relaxation


@dataclass(frozen=True, slots=True)
class GatedPass:
    """What a batch that went through a gated network brings back.

    Attributes:
        logits_EBC: One tensor of raw scores per exit, shape (B, C), the earliest first.
        scores_BG: The gates' scores, in [0, 1].
        decisions_BG: What the bodies were multiplied with.
        log_probs_BG: Logarithm of each decision's probability where they were drawn, else None.
        shares_BG: What share of each body an open gate needs, where parts of it can be shut too, else None.
    """

    logits_EBC: Sequence[torch.Tensor]
    scores_BG: torch.Tensor
    decisions_BG: torch.Tensor
    log_probs_BG: torch.Tensor | None = None
    shares_BG: torch.Tensor | None = None

    def in_float32(self) -> Self:
        """Give the same in float32, in which losses are computed."""
        return replace(
            self,
            logits_EBC=[logits_BC.float() for logits_BC in self.logits_EBC],
            scores_BG=self.scores_BG.float(),
            decisions_BG=self.decisions_BG.float(),
            log_probs_BG=None if self.log_probs_BG is None else self.log_probs_BG.float(),
            shares_BG=None if self.shares_BG is None else self.shares_BG.float(),
        )


class GateNotes:
    """Decides at one gate after the other and keeps what was decided.

    Args:
        relax: How it decides.
    """

    def __init__(self, relax: Relaxation) -> None:
        self._relax = relax
        self._scores: list[torch.Tensor] = []
        self._choices: list[Choice] = []

    def decide(self, log_odds_B: torch.Tensor) -> torch.Tensor:
        """Decide at the next gate, given its log-odds to be open; gives the decision, shape (B,)."""
        choice = self._relax(log_odds_B, len(self._choices))
        self._scores.append(torch.sigmoid(log_odds_B))
        self._choices.append(choice)
        return choice.decision_B

    def finish(self, logits_EBC: Sequence[torch.Tensor]) -> GatedPass:
        """Give the whole pass, with the logits that it ended in."""
        drawn = [choice.log_prob_B for choice in self._choices if choice.log_prob_B is not None]
        return GatedPass(
            logits_EBC,
            torch.stack(self._scores, dim=1),
            torch.stack([choice.decision_B for choice in self._choices], dim=1),
            torch.stack(drawn, dim=1) if len(drawn) == len(self._choices) else None,
        )
