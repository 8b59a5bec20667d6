"""Gates whose score does not depend on the image: how deep a network goes is the caller's choice.

Shapes: B = batch, G = gates.
"""

from collections.abc import Sequence

import torch

from offramp_models.gates.scoring import Gates, Scorer


class FixedGates(Gates):
    """Gates of a depth that the caller chooses; nothing in them is learnt.

    In evaluation a gate's score is its priority: raising the threshold shuts the gate of the lowest priority first. In
    training every gate is open or shut by chance, the whole batch alike.

    Args:
        priorities_G: From 0.5 to 1, so that all gates are open at a threshold of 0.5.
        kept_G: How probably each is open in a step of training.

    Attributes:
        log_odds_G: Of the priorities.
        kept_G: As given.
    """

    log_odds_G: torch.Tensor
    kept_G: torch.Tensor

    def __init__(self, priorities_G: Sequence[float], kept_G: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("log_odds_G", torch.logit(torch.tensor(priorities_G, dtype=torch.float64)).float())
        self.register_buffer("kept_G", torch.tensor(kept_G))

    def start(self, images_BDHW: torch.Tensor) -> Scorer:
        """Give what scores; every row gets the same."""
        log_odds_G = self.log_odds_G
        if self.training:
            log_odds_G = torch.where(torch.bernoulli(self.kept_G) > 0.5, torch.inf, -torch.inf)
        batch = images_BDHW.shape[0]
        return lambda _, gate_index: log_odds_G[gate_index].expand(batch)
