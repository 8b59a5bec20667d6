"""What held-out data lets one promise about the settings along a walk from full depth to ever less.

Learn then Test with fixed-sequence testing (https://arxiv.org/abs/2110.01052): walk from the safest setting, test at
each whether its risk is above epsilon with the exact binomial tail, stop at the first p-value above delta and return
the setting before it. A setting l is thus returned or passed if and only if no p-value up to l is above delta, that is
if epsilon is at least the greatest of the one-sided Clopper-Pearson bounds up to l. So the running maximum of these
bounds is the least epsilon that l is certified for, and answers for every epsilon at once.

Conformal risk control (https://arxiv.org/abs/2208.02814) bounds the risk on average: a loss that only grows along the
walk, with mean R over n samples, is controlled at epsilon where (n R + 1) / (n + 1) <= epsilon.

The walk must not have been chosen on the samples that certify it. Full depth comes first: it differs from itself in no
answer, by definition and without a test.

Shapes: N = samples, L = settings along the walk.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from offramp_contract.budgets import ACCURACY_DELTA
from offramp_contract.calibration import Certificate, CertificateKind
from offramp_contract.policy_spec import PolicySpec
from offramp_contract.statistics import BoolArray, FloatArray, IntArray
from scipy.stats import beta

from offramp_calibration.outcomes import Outcomes
from offramp_calibration.replay import Replayed, replay

RISK_DELTAS: Final = (0.01, 0.05, 0.1)


@dataclass(frozen=True, slots=True)
class Losses:
    """How often each setting of a walk loses.

    Attributes:
        num_samples: Number n of samples counted over.
        count_L: Samples that lose.
        ever_count_L: Samples that lose at this setting or at one before it.
    """

    num_samples: int
    count_L: IntArray
    ever_count_L: IntArray

    @classmethod
    def count(cls, loss_LN: Iterable[BoolArray]) -> Self:
        """Count losses, given setting by setting, the safest first."""
        count_L, ever_count_L, num_samples = [], [], 0
        ever_N: BoolArray | None = None
        for loss_N in loss_LN:
            ever_N = loss_N if ever_N is None else ever_N | loss_N
            count_L.append(int(loss_N.sum()))
            ever_count_L.append(int(ever_N.sum()))
            num_samples = len(loss_N)
        return cls(num_samples, np.array(count_L), np.array(ever_count_L))

    def behind(self, start: int) -> Self:
        """Give those of the walk from a setting on; of losses at any setting before, those that have occurred stay."""
        return type(self)(self.num_samples, self.count_L[start:], self.ever_count_L[start:])

    def ltt_bounds(self, delta: float) -> FloatArray:
        """Give the least epsilon that each setting is certified for with probability 1 - delta, rising."""
        bound_L = np.maximum.accumulate(greatest_risk(self.count_L, self.num_samples, delta))
        return _full_depth_first(bound_L)

    def crc_bounds(self) -> FloatArray:
        """Give the least epsilon that each setting's risk is controlled at on average, rising."""
        return _full_depth_first((self.ever_count_L + 1) / (self.num_samples + 1))


def certify(
    walk: Sequence[PolicySpec], outcomes: Outcomes, data_digest: str, deltas: Sequence[float] = RISK_DELTAS
) -> list[tuple[Certificate, ...]]:
    """Certify every setting of a walk over policies.

    Args:
        walk: The settings, full depth first, the safest next; see `greedy_family`.
        outcomes: The samples to certify on, none of which the walk was chosen on.
        data_digest: Of all the data, for the record.
        deltas: With which probabilities the certificates of the two risks may be wrong.

    Returns:
        Per setting its certificates.
    """
    return certify_replayed((replay(policy, outcomes) for policy in walk), data_digest, deltas)


def certify_replayed(
    walk: Iterable[Replayed], data_digest: str, deltas: Sequence[float] = RISK_DELTAS, *, most_accurate: int = 0
) -> list[tuple[Certificate, ...]]:
    """Certify every setting of a walk over policies and gate thresholds.

    Args:
        walk: What each setting comes to on the samples to certify on, none of which the walk was chosen on; full depth
            first, the safest next.
        data_digest: Of all the data, for the record.
        deltas: With which probabilities the certificates of the two risks may be wrong.
        most_accurate: Where on the walk the tests of accuracy begin, as fixed beforehand as the walk itself. What comes
            before costs more and is expected to be right less often: it gets no certificate of accuracy.

    Returns:
        Per setting its certificates.
    """
    losses = _count_losses(walk)
    certificates: list[list[Certificate]] = [[] for _ in losses["accuracy"].count_L]

    def add(kind: CertificateKind, bound_L: FloatArray, delta: float | None, start: int = 0) -> None:
        method = "crc" if delta is None else "ltt"
        for setting, bound in zip(certificates[start:], bound_L.tolist(), strict=True):
            setting.append(
                Certificate(
                    kind=kind,
                    method=method,
                    bound=bound,
                    delta=delta,
                    num_samples=losses[kind].num_samples,
                    data_digest=data_digest,
                )
            )

    risks: tuple[CertificateKind, ...] = ("consistency", "accuracy_loss")
    for kind in risks:
        for delta in deltas:
            add(kind, losses[kind].ltt_bounds(delta), delta)
        add(kind, losses[kind].crc_bounds(), None)
    wrong = losses["accuracy"].behind(most_accurate)
    add("accuracy", accuracy_bounds(wrong, ACCURACY_DELTA), ACCURACY_DELTA, most_accurate)
    return [tuple(setting) for setting in certificates]


def accuracy_bounds(wrong: Losses, delta: float) -> FloatArray:
    """Give the greatest accuracy that each setting is certified for with probability 1 - delta, falling."""
    return 1.0 - np.maximum.accumulate(greatest_risk(wrong.count_L, wrong.num_samples, delta))


def greatest_risk(count_L: IntArray, num_samples: int, delta: float) -> FloatArray:
    """Give the one-sided Clopper-Pearson bound: the epsilon at which P(Bin(n, epsilon) <= count) is delta.

    Args:
        count_L: Losses among the samples.
        num_samples: How many samples, n.
        delta: The probability that the bound may be wrong.
    """
    bound_L = np.ones(len(count_L))
    some = count_L < num_samples
    bound_L[some] = beta.ppf(1 - delta, count_L[some] + 1, num_samples - count_L[some])
    return bound_L


def _full_depth_first(bound_L: FloatArray) -> FloatArray:
    return np.concatenate([[0.0], bound_L[1:]])


def _count_losses(walk: Iterable[Replayed]) -> dict[CertificateKind, Losses]:
    """Count what each kind of certificate bounds; of `accuracy`, the wrong answers."""
    lost_LNs: dict[CertificateKind, list[BoolArray]] = {"consistency": [], "accuracy_loss": [], "accuracy": []}
    for replayed in walk:
        lost_LNs["consistency"].append(replayed.differs_N)
        lost_LNs["accuracy_loss"].append(replayed.lost_N)
        lost_LNs["accuracy"].append(~replayed.right_N)
    return {kind: Losses.count(loss_LN) for kind, loss_LN in lost_LNs.items()}
