"""Exits that cost more than they save: the exporter merges, the runtime times, the calibration judges.

advice = advise_exits(bundle, outcomes, policy, open_device("cpu"), inputs)
if advice.merge:
    merge_exits(bundle, advice.merge, Path("merged"), examples=inputs)
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from offramp_contract.errors import ExportError
from offramp_contract.policy_spec import PolicySpec, without_exits

from offramp_cli.errors import EXTRA_OF_MODULE, missing_extra

if TYPE_CHECKING:
    from offramp_calibration import Outcomes
    from offramp_calibration.advice import Advice, Setting
    from offramp_calibration.timing import HeadCost
    from offramp_runtime import Bundle, Device

_WITHOUT_TORCH = "what the exits' heads cost is not known: "
_NO_FASTER = (
    "merging the exits with that verdict, tried and timed, was no faster than the bundle as it is, so none is advised; "
    "the machine may have been too busy to tell"
)


def advise_exits(
    bundle: "Bundle", outcomes: "Outcomes", policy: PolicySpec, device: "Device", inputs: Mapping[str, np.ndarray]
) -> "Advice":
    """Say which exits cost more than they save, and what merging them gives, both measured on this machine.

    Args:
        bundle: The bundle.
        outcomes: What its exits decided about held-out data.
        policy: The rule that rows leave by, or that of an operating point.
        device: Where the stages are timed.
        inputs: Rows of the data, by input's name; as many as a batch that serves.

    Returns:
        The advice. Where the heads' costs cannot be known, because torch is not installed or the stages cannot be
        joined, it says what they may cost at most, and why in `note`.
    """
    from offramp_calibration.advice import PathCosts, advise
    from offramp_calibration.timing import time_stages

    heads: tuple[HeadCost, ...] = ()
    note = None
    try:
        heads = _head_costs(bundle, device, inputs)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA_OF_MODULE:
            raise
        note = _WITHOUT_TORCH + missing_extra(package)
    except ExportError as error:
        note = _WITHOUT_TORCH + error.message
    costs = PathCosts.of(time_stages([bundle], device, inputs)[0], heads)
    advice = advise(outcomes, policy, [exit_.name for exit_ in bundle.manifest.exits], costs)
    if advice.merge:
        now, merged = _measured(bundle, outcomes, advice, device, inputs)
        advice = replace(advice, now=now, merged=merged)
        if merged.ms >= now.ms:
            advice, note = replace(advice, merge=(), merged=None), _NO_FASTER
    return replace(advice, note=note)


def merge_exits(
    bundle: "Bundle",
    drop: Collection[int],
    out: Path,
    *,
    examples: Mapping[str, np.ndarray] | None = None,
    overwrite: bool = False,
) -> "Bundle":
    """Write the bundle without some exits, proved; see `offramp_exporter.merge.merge_exits`."""
    from offramp_exporter.merge import merge_exits as merge

    return merge(bundle, sorted(drop), out, examples=examples, overwrite=overwrite)


def _head_costs(bundle: "Bundle", device: "Device", inputs: Mapping[str, np.ndarray]) -> "tuple[HeadCost, ...]":
    """Time the bundle beside the one that lacks an exit, for each exit in turn."""
    from offramp_calibration.timing import head_cost, time_stages
    from offramp_exporter.merge import without_exits as merged_bundle

    heads = []
    for index in range(len(bundle.manifest.exits) - 1):
        whole, without = time_stages([bundle, merged_bundle(bundle, {index})], device, inputs)
        heads.append(head_cost(whole, without, index))
    return tuple(heads)


def _measured(
    bundle: "Bundle", outcomes: "Outcomes", advice: "Advice", device: "Device", inputs: Mapping[str, np.ndarray]
) -> "tuple[Setting, Setting]":
    """Measure the policy with all exits and without those that are to be merged, beside each other."""
    from offramp_calibration import replay
    from offramp_calibration.advice import PathCosts, setting_of
    from offramp_calibration.timing import time_stages
    from offramp_exporter.merge import without_exits as merged_bundle

    whole, fewer = map(PathCosts.of, time_stages([bundle, merged_bundle(bundle, advice.merge)], device, inputs))
    spec = without_exits(advice.policy, advice.merge, outcomes.num_exits, outcomes.native)
    now = setting_of(replay(advice.policy, outcomes), whole.flops_E, whole.ms_E, whole)
    then = setting_of(replay(spec, outcomes.without_exits(advice.merge)), fewer.flops_E, fewer.ms_E, whole)
    return now, then
