"""Losses over several exits.

Shapes: B = batch, C = classes, E = exits.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional


def weighted_loss(
    logits_EBC: Sequence[torch.Tensor], labels_B: torch.Tensor, weights_E: Sequence[float] = ()
) -> torch.Tensor:
    """Sum every exit's cross-entropy, each with its own weight (survey eq. 18).

    Args:
        logits_EBC: One tensor of raw scores per exit, float32, shape (B, C).
        labels_B: The right classes, int64, shape (B,).
        weights_E: What each exit's loss counts; empty: 1 each.

    Returns:
        A scalar.

    Raises:
        ValueError: If there is not one weight per exit.
    """
    return _weighted(logits_EBC, labels_B, weights_E, "mean")


def weighted_losses_of_rows(
    logits_EBC: Sequence[torch.Tensor], labels_B: torch.Tensor, weights_E: Sequence[float] = ()
) -> torch.Tensor:
    """Give every row's own part in `weighted_loss`, shape (B,); their mean is that loss."""
    return _weighted(logits_EBC, labels_B, weights_E, "none")


def _weighted(
    logits_EBC: Sequence[torch.Tensor], labels_B: torch.Tensor, weights_E: Sequence[float], reduction: str
) -> torch.Tensor:
    weights_E = weights_E or (1.0,) * len(logits_EBC)
    if len(weights_E) != len(logits_EBC):
        raise ValueError(f"{len(logits_EBC)} exits need as many loss weights; got {len(weights_E)}")
    losses_E = [
        weight * functional.cross_entropy(logits_BC, labels_B, reduction=reduction)
        for weight, logits_BC in zip(weights_E, logits_EBC, strict=True)
    ]
    return torch.stack(losses_E).sum(dim=0)
