"""Losses over several exits.

Shapes: B = batch, C = classes, E = exits.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional


def weighted_loss(
    logits_EBC: Sequence[torch.Tensor], labels_B: torch.Tensor, weights_E: Sequence[float]
) -> torch.Tensor:
    """Sum every exit's cross-entropy, each with its own weight (survey eq. 18).

    Args:
        logits_EBC: One tensor of raw scores per exit, float32, shape (B, C).
        labels_B: The right classes, int64, shape (B,).
        weights_E: What each exit's loss counts.

    Returns:
        A scalar.

    Raises:
        ValueError: If there is not one weight per exit.
    """
    if len(weights_E) != len(logits_EBC):
        raise ValueError(f"{len(logits_EBC)} exits need as many loss weights; got {len(weights_E)}")
    losses_E = [
        weight * functional.cross_entropy(logits_BC, labels_B)
        for weight, logits_BC in zip(weights_E, logits_EBC, strict=True)
    ]
    return torch.stack(losses_E).sum()
