"""Certificates beside what a data set shows: what was promised, what came of it, and whether it held."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from offramp_contract.budgets import ACCURACY_DELTA, Promise, certified_accuracy, certified_risk
from offramp_contract.calibration import Certificate, CertificateKind, OperatingPoint
from offramp_contract.errors import InvalidValue

from offramp_calibration.measured import MeasuredPoint, Proportion

RISKS = (0.005, 0.01, 0.02, 0.05)
RISK_DELTA = 0.05
BELOW_BEST_ACCURACY = (0.0, 0.01, 0.02, 0.05)


@dataclass(frozen=True, slots=True)
class PromiseResult:
    """A certified budget that a request may ask for, and what it comes to on this data.

    Attributes:
        asked: The risk, or the accuracy.
        delta: Probability that the certificate may be wrong; None: the risk is controlled on average.
        bound: What the certificate of the chosen point says.
        num_samples: Size of the data that the certificate rests on.
        realised: The same share on this data.
        held: Whether the realised share is within the bound.
        within_noise: Whether the bound lies in the realised share's 95 % interval or held.
    """

    kind: CertificateKind
    asked: float
    delta: float | None
    point: str
    compute: float
    bound: float
    num_samples: int
    realised: Proportion
    held: bool
    within_noise: bool


@dataclass(frozen=True, slots=True)
class CertificateCount:
    """How many certificates of one kind held on this data.

    Attributes:
        num_held: The realised share is within the bound.
        num_refuted: It is not, and by more than this data's 95 % interval.
    """

    kind: CertificateKind
    method: str
    delta: float | None
    total: int
    num_held: int
    num_refuted: int


def promise_results(
    points: Sequence[OperatingPoint], measured: Mapping[str, MeasuredPoint]
) -> tuple[PromiseResult, ...]:
    """Choose points for risks and accuracies as the server does, and compare; what would be refused is left out.

    Args:
        points: The bundle's.
        measured: The same on this data, by name.
    """
    results = []
    for asked, (point, certificate) in _promises(points):
        realised = _realised(certificate, measured[point.name])
        results.append(
            PromiseResult(
                kind=certificate.kind,
                asked=asked,
                delta=certificate.delta,
                point=point.name,
                compute=measured[point.name].compute,
                bound=certificate.bound,
                num_samples=certificate.num_samples,
                realised=realised,
                held=_held(certificate, realised),
                within_noise=not _refuted(certificate, realised),
            )
        )
    return tuple(results)


def certificate_counts(
    points: Sequence[OperatingPoint], measured: Mapping[str, MeasuredPoint]
) -> tuple[CertificateCount, ...]:
    """Count, for every kind of certificate, how many held.

    Args:
        points: The bundle's.
        measured: The same on this data, by name.
    """
    groups: defaultdict[tuple[CertificateKind, str, float | None], list[tuple[bool, bool]]] = defaultdict(list)
    for point in points:
        for certificate in point.certificates:
            realised = _realised(certificate, measured[point.name])
            key = (certificate.kind, certificate.method, certificate.delta)
            groups[key].append((_held(certificate, realised), _refuted(certificate, realised)))
    return tuple(
        CertificateCount(*key, len(verdicts), sum(held for held, _ in verdicts), sum(beyond for _, beyond in verdicts))
        for key, verdicts in groups.items()
    )


def _promises(points: Sequence[OperatingPoint]) -> Iterator[tuple[float, Promise]]:
    kinds: tuple[CertificateKind, ...] = ("consistency", "accuracy_loss")
    for kind in kinds:
        for delta in (RISK_DELTA, None):
            for risk in RISKS:
                try:
                    yield risk, certified_risk(points, risk, delta, kind)
                except InvalidValue:
                    continue  # the server refuses it, so nobody is promised anything
    bounds = [held.bound for point in points if (held := point.certificate("accuracy", ACCURACY_DELTA))]
    best = math.floor(1000 * max(bounds, default=0.0)) / 1000
    for below in BELOW_BEST_ACCURACY if bounds else ():
        accuracy = round(max(best - below, 0.0), 3)
        yield accuracy, certified_accuracy(points, accuracy)


def _realised(certificate: Certificate, measured: MeasuredPoint) -> Proportion:
    shares = {"consistency": measured.differs, "accuracy_loss": measured.lost, "accuracy": measured.accuracy}
    return shares[certificate.kind]


def _held(certificate: Certificate, realised: Proportion) -> bool:
    if certificate.kind == "accuracy":
        return realised.value >= certificate.bound
    return realised.value <= certificate.bound


def _refuted(certificate: Certificate, realised: Proportion) -> bool:
    low, high = realised.interval
    return high < certificate.bound if certificate.kind == "accuracy" else low > certificate.bound
