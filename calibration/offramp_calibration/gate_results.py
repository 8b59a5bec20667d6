"""What each gate threshold comes to on a data set, for all who go to the final exit.

Shapes: N = samples, G = gates.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from offramp_contract.gates import gate_thresholds, opened
from offramp_contract.manifest import Manifest
from offramp_contract.policy_spec import FixedSpec
from offramp_contract.statistics import BoolArray

from offramp_calibration.about import GateThreshold
from offramp_calibration.gated import GATES
from offramp_calibration.measured import MeasuredPoint
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.replay import replay
from offramp_calibration.trace import GatePass, Trace


@dataclass(frozen=True, slots=True)
class GateRung:
    """One gate threshold.

    Attributes:
        threshold: What opened the gates; None: the network's own thresholds.
        point: Every sample going to the final exit.
        open_rates: Per gate the share of samples that it was open for; a gate that was not scored was shut.
    """

    threshold: float | None
    point: MeasuredPoint
    open_rates: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class GateResults:
    """All gate thresholds that were recorded.

    Attributes:
        names: Of the gates.
        rungs: The dearest first.
    """

    names: tuple[str, ...]
    rungs: tuple[GateRung, ...]

    @classmethod
    def of(cls, trace: Trace, manifest: Manifest, by_threshold: Mapping[GateThreshold, Outcomes]) -> "GateResults":
        """Measure every pass of a trace.

        Args:
            trace: Of a gated network.
            manifest: The bundle's.
            by_threshold: What its passes come to.
        """
        final = FixedSpec(exit=len(manifest.exits) - 1)
        rungs = []
        for one in trace.passes:
            name = called(one.threshold)
            replayed = replay(final, by_threshold[one.threshold])
            point = MeasuredPoint.of(name, GATES, replayed, None, policy=final, gate_threshold=one.threshold)
            rungs.append(GateRung(one.threshold, point, tuple(is_open(one, manifest).mean(axis=0).tolist())))
        rungs.sort(key=lambda rung: -rung.point.compute)
        return cls(tuple(gate.name for gate in manifest.gates), tuple(rungs))


def called(threshold: GateThreshold) -> str:
    """Give the name of a setting that no calibration has named: its gate threshold."""
    return f"{GATES}-own" if threshold is None else f"{GATES}-at-{threshold:.4g}"


def is_open(one: GatePass, manifest: Manifest) -> BoolArray:
    """Tell which gates were open for each sample in a pass, shape (N, G)."""
    threshold_G = gate_thresholds(manifest, threshold=one.threshold)
    # A gate with a priority has no score in the trace: it opens for all or for none.
    priority_G = np.array([np.nan if gate.priority is None else gate.priority for gate in manifest.gates])
    has_priority_G = ~np.isnan(priority_G)
    return opened(np.where(has_priority_G, priority_G, one.score_NG), threshold_G)
