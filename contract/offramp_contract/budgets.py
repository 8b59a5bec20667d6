"""From what a request says it wants to the operating point that gives it.

Every function takes the calibrated points of a bundle and gives the one to use, or refuses with the best reachable.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from offramp_contract.calibration import Certificate, CertificateKind, OperatingPoint
from offramp_contract.errors import InvalidValue

ACCURACY_DELTA = 0.05
"""A promised accuracy holds with probability 1 - this, at least."""


class Promise(NamedTuple):
    """An operating point and the certificate that it was chosen for."""

    point: OperatingPoint
    certificate: Certificate


def within_compute(points: Sequence[OperatingPoint], compute: float) -> OperatingPoint:
    """Choose the most accurate point whose expected compute is within a budget, the cheapest of equals.

    Raises:
        InvalidValue: If no point is cheap enough, naming the cheapest.
    """
    within = [point for point in points if point.compute <= compute]
    if not within:
        raise InvalidValue(_unreachable("compute", min((point.compute for point in points), default=None)), "compute")
    return max(within, key=lambda point: (point.accuracy, -point.compute))


def certified_accuracy(points: Sequence[OperatingPoint], accuracy: float) -> Promise:
    """Choose the cheapest point certified to reach an accuracy.

    Its bound is the least along the walk from full depth to the point, so that choosing the cheapest keeps the
    guarantee of fixed-sequence testing.

    Raises:
        InvalidValue: If none is certified for it, naming the best that is.
    """
    promises = list(_promises(points, "accuracy", ACCURACY_DELTA))
    reaching = [promise for promise in promises if promise.certificate.bound >= accuracy]
    if not reaching:
        best = max((promise.certificate.bound for promise in promises), default=None)
        raise InvalidValue(_unreachable("accuracy", best), "accuracy")
    return _cheapest(reaching)


def certified_risk(
    points: Sequence[OperatingPoint],
    epsilon: float,
    delta: float | None = None,
    kind: CertificateKind = "consistency",
) -> Promise:
    """Choose the cheapest point certified to keep a risk at or below epsilon.

    Args:
        points: The bundle's operating points.
        epsilon: The risk: a share of answers.
        delta: With which probability the certificate may be wrong; None: the risk is controlled on average (CRC).
        kind: Which risk.

    Raises:
        InvalidValue: If the calibration data were too few for this epsilon and delta, naming how many it takes; or if
            no point is certified for it, naming the best that is.
    """
    promises = list(_promises(points, kind, delta))
    if not promises:
        raise InvalidValue(_no_certificate(points, kind, delta), "risk")
    num_samples = promises[0].certificate.num_samples
    needed = least_samples(epsilon, delta)
    if num_samples < needed:
        raise InvalidValue(
            f"risk: epsilon {epsilon:g}{'' if delta is None else f' at delta {delta:g}'} takes at least {needed:,} "
            f"samples to certify; this model was certified on {num_samples:,}",
            "risk",
        )
    holding = [promise for promise in promises if promise.certificate.bound <= epsilon]
    if not holding:
        raise InvalidValue(_unreachable("risk", min(promise.certificate.bound for promise in promises)), "risk")
    return _cheapest(holding)


def least_samples(epsilon: float, delta: float | None) -> float:
    """Count the samples without which nothing but full depth can be certified, even if no answer ever differed.

    ln(delta) / ln(1 - epsilon) for the exact binomial tail, 1 / epsilon - 1 for conformal risk control.
    """
    if not 0 < epsilon < 1:
        return math.inf if epsilon <= 0 else 1
    if delta is None:
        return math.ceil(1 / epsilon - 1)
    return math.ceil(math.log(delta) / math.log1p(-epsilon)) if delta > 0 else math.inf


def _promises(points: Iterable[OperatingPoint], kind: CertificateKind, delta: float | None) -> Iterable[Promise]:
    for point in points:
        certificate = point.certificate(kind, delta)
        if certificate is not None:
            yield Promise(point, certificate)


def _cheapest(promises: Sequence[Promise]) -> Promise:
    return min(promises, key=lambda promise: promise.point.compute)


def _no_certificate(points: Sequence[OperatingPoint], kind: CertificateKind, delta: float | None) -> str:
    deltas = [c.delta for point in points for c in point.certificates if c.kind == kind and c.delta is not None]
    if delta is None or not deltas:
        return _unreachable("risk", None)
    return f"risk.delta: the certificates of this model hold at delta {min(deltas):g} or above"


def _unreachable(budget: str, best: float | None) -> str:
    if best is None:
        return (
            f"{budget}: this model has no operating point calibrated for it; "
            "calibrate it with `offramp calibrate`, or ask with policy and threshold instead"
        )
    # Rounded to the side on which asking for it succeeds.
    outward = math.ceil if budget != "accuracy" else math.floor
    return f"{budget}: no operating point of this model reaches it; the best reachable is {outward(best * 1e4) / 1e4:g}"
