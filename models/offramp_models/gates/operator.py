"""The gate operator: a score becomes a hard decision, and leaves a mark in a traced program.

Shapes: B = batch.
"""

import torch


def gate(score: torch.Tensor, threshold: float = 0.5, name: str = "") -> torch.Tensor:
    """Decide, for every row, whether what stands behind a gate runs (survey eq. 8).

    Usable in any module: a block is gated where it is written `shortcut(x) + gate(score) * body(x)`, or the like. The
    exporter finds the operator in the traced program with the score in front of it, so that the threshold stays a knob
    of serving. The gradient of the decision is handed to the score unchanged (straight-through,
    https://arxiv.org/abs/1308.3432).

    Args:
        score: One number in [0, 1] per row, of a float type, shape (B,), (B, 1) or (B, 1, 1, 1).
        threshold: The gate opens for scores from here on; in [0, 1].
        name: What the gate is called in the bundle; empty: it is numbered.

    Returns:
        1 where the gate is open and 0 where it is shut (also for NaN), shape and type of the score.

    Raises:
        ValueError: If the scores are not one per row or not of a float type, or the threshold is not in [0, 1].
    """
    if score.dim() < 1 or any(size != 1 for size in score.shape[1:]):
        raise ValueError(f"a gate's score must be one number per row, shape (B,) or (B, 1, ..); got {_shape(score)}")
    if not score.is_floating_point():
        raise ValueError(f"a gate's score must be of a float type; got {score.dtype}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"a gate's threshold must be from 0 to 1; got {threshold}")
    decision: torch.Tensor = _gate(score, float(threshold), name)
    return decision


@torch.library.custom_op("offramp::gate", mutates_args=())
def _gate(score: torch.Tensor, threshold: float, name: str) -> torch.Tensor:
    return (score >= threshold).to(score.dtype)


@_gate.register_fake
def _(score: torch.Tensor, threshold: float, name: str) -> torch.Tensor:
    return torch.empty_like(score)


def _straight_through(_: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return gradient, None, None


_gate.register_autograd(_straight_through)


def _shape(score: torch.Tensor) -> str:
    return f"({', '.join(map(str, score.shape))})"
