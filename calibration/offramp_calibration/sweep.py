"""The settings of every policy that are worth a look, with thresholds that come from the data.

Shapes: N = samples, K = exits that decide (all but the last), L = levels.
"""

import math
from collections.abc import Callable, Iterable
from itertools import combinations, product
from typing import Final

import numpy as np
from offramp_contract.policy_spec import (
    AgreementSpec,
    AllOfSpec,
    AnyOfSpec,
    ConfidenceSpec,
    EntropySpec,
    FixedSpec,
    MarginSpec,
    NativeSpec,
    PatienceSpec,
    PolicySpec,
    WindowSpec,
)
from offramp_contract.statistics import Decision, FloatArray

from offramp_calibration.outcomes import Outcomes
from offramp_calibration.thresholds import ALWAYS, NEVER, as_certain, confidence_of, cuts_between

# Statistics are float32: below these, what is left of an entropy, or of 1 - margin, is rounding noise.
LEAST_ENTROPY: Final = 1e-5
LEAST_MARGIN_GAP: Final = 1e-4
MAX_STATIC_EXITS: Final = 256
OWN: Final = "native-own"
"""The family of the one setting that is in the network's own code."""


def sweeps(outcomes: Outcomes, num_settings: int) -> dict[str, list[PolicySpec]]:
    """Give the settings to try, by family.

    Args:
        outcomes: What the exits decided; its scores say where thresholds make a difference.
        num_settings: About how many a family may have. `fixed` has every exit but the final one, which the walk that
            certificates are made along begins with; of more than `MAX_STATIC_EXITS`, as many, evenly spread.
    """
    last = outcomes.num_exits - 1
    if last == 0:
        return {}
    confidences = confidence_thresholds(outcomes, num_settings)
    patiences = _spread(1, last, num_settings)
    families: dict[str, Iterable[PolicySpec]] = {
        "fixed": (FixedSpec(exit=index) for index in _spread(0, last - 1, MAX_STATIC_EXITS)),
        "confidence": (ConfidenceSpec(threshold=threshold) for threshold in confidences),
        "entropy": (EntropySpec(threshold=threshold) for threshold in _entropies(outcomes, num_settings)),
        "margin": (MarginSpec(threshold=threshold) for threshold in _margins(outcomes, num_settings)),
        "agreement": (AgreementSpec(threshold=share) for share in _agreements(last, num_settings)),
        "patience": (PatienceSpec(patience=patience) for patience in patiences),
        "window": _windows(outcomes, num_settings),
        **_natives(outcomes, num_settings),
        **_combinations(outcomes, patiences, num_settings),
    }
    return {family: list(specs) for family, specs in families.items()}


def confidence_thresholds(outcomes: Outcomes, most: int) -> list[float]:
    """Give scalar confidence thresholds from `ALWAYS` to `NEVER`, evenly spread over the log-odds that occur."""
    cuts = _cuts(outcomes, lambda decision: as_certain(decision.log_odds_B), most - 2)
    return [ALWAYS, *map(confidence_of, cuts), NEVER]


def _entropies(outcomes: Outcomes, most: int) -> list[float]:
    cuts = _cuts(outcomes, lambda decision: np.maximum(decision.entropy_B, LEAST_ENTROPY), most - 1)
    return [*np.clip(cuts, 0.0, 1.0).tolist(), 1.0]


def _margins(outcomes: Outcomes, most: int) -> list[float]:
    cuts = _cuts(outcomes, lambda decision: np.minimum(decision.margin_B, 1 - LEAST_MARGIN_GAP), most - 1)
    return [0.0, *np.clip(cuts, 0.0, 1.0).tolist()]


def _agreements(most_votes: int, most: int) -> list[float]:
    """Give the shares of agreeing votes that a number of exits can show: a/b for at most `most_votes` votes."""
    some_votes = _spread(1, most_votes, 64)
    shares = sorted({agreeing / votes for votes in some_votes for agreeing in range(1, votes + 1)})
    return [shares[index] for index in _spread(0, len(shares) - 1, most)]


def _windows(outcomes: Outcomes, most: int) -> list[WindowSpec]:
    """Pair confidences: below the lower a sample is hopeless, above the higher it is sure."""
    num_thresholds = (1 + math.isqrt(1 + 8 * most)) // 2  # n thresholds make n (n - 1) / 2 pairs
    pairs = combinations(confidence_thresholds(outcomes, num_thresholds), 2)
    return [WindowSpec(low=low, high=high) for low, high in pairs]


def _natives(outcomes: Outcomes, most: int) -> dict[str, list[PolicySpec]]:
    """Give the network's own setting, and where its exits compare with one number, others in that number's place."""
    if outcomes.native is None:
        return {}
    own: dict[str, list[PolicySpec]] = {OWN: [NativeSpec()]}
    knobs = [index for index, rule in enumerate(outcomes.native.rules_N) if rule.is_knob]
    scores = [outcomes.decision_E[index].native_B for index in knobs]
    finite = [native_N[np.isfinite(native_N)] for native_N in scores if native_N is not None]
    if not any(native_N.size for native_N in finite):
        return own
    cuts = cuts_between(np.concatenate(finite), np.linspace(0, 1, most))
    return own | {"native": [NativeSpec(threshold=float(cut)) for cut in cuts]}


def _combinations(outcomes: Outcomes, patiences: list[int], num_settings: int) -> dict[str, list[PolicySpec]]:
    """Pair patiences with confidences: both must agree to leave, or either may."""
    some = [patiences[index] for index in _spread(0, len(patiences) - 1, 16)]
    confidences = confidence_thresholds(outcomes, max(8, num_settings // len(some)))[1:-1]
    pairs = [
        (PatienceSpec(patience=patience), ConfidenceSpec(threshold=threshold))
        for patience, threshold in product(some, confidences)
    ]
    return {
        "patience-and-confidence": [AllOfSpec(of=pair) for pair in pairs],
        "patience-or-confidence": [AnyOfSpec(of=pair) for pair in pairs],
    }


def _cuts(outcomes: Outcomes, score_of: Callable[[Decision], FloatArray], most: int) -> FloatArray:
    """Cut a statistic of all exits that decide at evenly spread quantiles."""
    scores = np.concatenate([score_of(decision) for decision in outcomes.decision_E[:-1]])
    return cuts_between(scores, np.linspace(0, 1, most))


def _spread(first: int, last: int, most: int) -> list[int]:
    """Give at most so many whole numbers from first to last, both included, evenly spread."""
    return sorted({round(value) for value in np.linspace(first, last, min(most, last - first + 1)).tolist()})
