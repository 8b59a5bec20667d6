"""REINFORCE: how decisions that were drawn learn from what came of them.

Shapes: B = batch, G = gates in the order in which they decide.
"""

import torch


def reinforce_loss(log_probs_BG: torch.Tensor, rewards_BG: torch.Tensor, baselines_BG: torch.Tensor) -> torch.Tensor:
    """Give a scalar whose gradient is that of REINFORCE: minus the mean over rows of (reward - baseline) * d log p.

    https://doi.org/10.1007/BF00992696

    Args:
        log_probs_BG: Logarithm of the probability that each decision was drawn with.
        rewards_BG: What each decision is to be praised for; (B, 1) where all of a row share one reward.
        baselines_BG: What was to be expected whatever the row's own decisions; any such number leaves the gradient's
            mean as it is and lowers its variance.
    """
    advantages_BG = (rewards_BG - baselines_BG).detach()
    return -(advantages_BG * log_probs_BG).sum(dim=1).mean()
