"""The decision statistics of an exit: their names, their order, and a numpy oracle.

Every stage graph that ends in an exit emits one packed float32 tensor, its *decision*, of shape (B, 3 + 2K):

    log_odds, entropy, margin, p_(1) .. p_(K), class_(1) .. class_(K)        K = min(C, MAX_TOP)

so that what leaves the accelerator is a few numbers per row, not C logits. Where the network has a rule of its own for
leaving at the exit, one more column holds that rule's score, and the width is even. The graphs compute it (the one
source); `decision_of_logits` defines the same numbers in numpy and is the tests' and the exporter's oracle.

Shapes: B = batch, C = classes, K = leading classes kept.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.floating]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
IntArray: TypeAlias = npt.NDArray[np.integer]

MAX_TOP = 5
LOG_ODDS, ENTROPY, MARGIN, FIRST_TOP = 0, 1, 2, 3


def num_top(num_classes: int) -> int:
    """Count the leading classes that a decision tensor holds for an exit of `num_classes` classes."""
    return min(num_classes, MAX_TOP)


def decision_width(num_classes: int, has_native: bool = False) -> int:
    """Count the columns of a decision tensor for an exit of `num_classes` classes, with or without a native score."""
    return FIRST_TOP + 2 * num_top(num_classes) + has_native


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision tensor with its columns named; every property is a view.

    Attributes:
        packed_BD: float32, shape (B, 3 + 2K) or (B, 3 + 2K + 1), laid out as the module says.
    """

    packed_BD: FloatArray

    @property
    def log_odds_B(self) -> FloatArray:
        """`ln(p_max / (1 - p_max))`: rises with confidence and, unlike it, does not saturate at 1."""
        return self.packed_BD[:, LOG_ODDS]

    @property
    def entropy_B(self) -> FloatArray:
        """`H(p) / ln C`, in [0, 1]; 0 is certain (survey eq. 11, normalised)."""
        return self.packed_BD[:, ENTROPY]

    @property
    def margin_B(self) -> FloatArray:
        """`p_(1) - p_(2)`, in [0, 1]."""
        return self.packed_BD[:, MARGIN]

    @property
    def top_probability_BK(self) -> FloatArray:
        """The K largest probabilities, falling."""
        return self.packed_BD[:, FIRST_TOP : self._first_class]

    @property
    def top_class_BK(self) -> IntArray:
        """The classes of `top_probability_BK`, int32 (exact in float32 up to 2^24 classes)."""
        return self.packed_BD[:, self._first_class : 2 * self._first_class - FIRST_TOP].astype(np.int32)

    @property
    def class_B(self) -> IntArray:
        """The predicted class of each row, int32."""
        return self.packed_BD[:, self._first_class].astype(np.int32)

    @property
    def native_B(self) -> FloatArray | None:
        """The score of the network's own exit rule, never NaN; None where the exit has none."""
        return self.packed_BD[:, -1] if self.packed_BD.shape[1] % 2 == 0 else None

    @property
    def is_finite(self) -> bool:
        """Whether `is_finite_B` holds for every row, at a fraction of the price: only a NaN squared adds up to NaN."""
        return not math.isnan(np.vdot(self.packed_BD, self.packed_BD))

    @property
    def is_finite_B(self) -> BoolArray:
        """False for rows whose statistics are NaN. Infinite log-odds are a legitimate certainty."""
        finite_B: BoolArray = np.logical_not(np.isnan(self.packed_BD).any(axis=1))
        return finite_B

    @property
    def _first_class(self) -> int:
        width: int = self.packed_BD.shape[1]
        return FIRST_TOP + (width - FIRST_TOP) // 2


def log_softmax(logits_BC: FloatArray) -> FloatArray:
    """Give `ln softmax(logits)` over the last axis, float64, stable for any finite logits; NaN where one is not."""
    wide_BC = logits_BC.astype(np.float64)
    with np.errstate(invalid="ignore"):
        shifted_BC: FloatArray = wide_BC - wide_BC.max(axis=-1, keepdims=True)
    log_p_BC: FloatArray = shifted_BC - np.log(np.exp(shifted_BC).sum(axis=-1, keepdims=True))
    return log_p_BC


def logit(probability: FloatArray) -> FloatArray:
    """Give the log-odds of a probability; 0 and 1 map to -inf and +inf."""
    with np.errstate(divide="ignore"):
        return np.log(probability) - np.log1p(-np.asarray(probability))


def decision_of_logits(logits_BC: FloatArray, temperature: float = 1.0) -> FloatArray:
    """Compute an exit's packed decision tensor in numpy.

    Args:
        logits_BC: Raw exit-head scores, shape (B, C), C >= 2. Not softmaxed.
        temperature: The exit's calibrated temperature T; probabilities are softmax(logits / T).

    Returns:
        float32, shape (B, 3 + 2K), laid out as the module says. Of equal logits the lower class comes first. A class of
        logit -inf has probability 0; a row with NaN or +inf gives NaN.
    """
    scaled_BC = logits_BC.astype(np.float64) / temperature
    num_rows, num_classes = scaled_BC.shape
    order_BK = np.argsort(-scaled_BC, axis=1, kind="stable")[:, : num_top(num_classes)]
    log_p_BC = log_softmax(scaled_BC)
    p_BC = np.exp(log_p_BC)
    with np.errstate(divide="ignore", invalid="ignore"):
        odds_against_BC = np.exp(scaled_BC - scaled_BC.max(axis=1, keepdims=True))
        odds_against_BC[np.arange(num_rows), order_BK[:, 0]] = 0.0
        log_odds_B = -np.log(odds_against_BC.sum(axis=1))
        entropy_B = -np.where(p_BC == 0, 0.0, p_BC * log_p_BC).sum(axis=1) / np.log(num_classes)
    top_p_BK = np.take_along_axis(p_BC, order_BK, axis=1)
    margin_B = top_p_BK[:, 0] - top_p_BK[:, 1]
    head_B3 = np.stack([log_odds_B, entropy_B, margin_B], axis=1)
    return np.concatenate([head_B3, top_p_BK, order_BK], axis=1).astype(np.float32)
