"""The labelled inputs of a load test: how hard each is, and what the label oracle would ask for it.

Shapes: N = samples, E = exits, P = passes at other gate thresholds.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from offramp_calibration import Outcomes, Trace
from offramp_calibration.about import ALL_OPEN
from offramp_calibration.oracles import first_true_or_last
from offramp_cli.labelled_data import open_data
from offramp_cli.recording import Recording, traced
from offramp_loadtest import Payload, payloads_of_arrays
from offramp_runtime import Bundle

BATCH = 500
GATES_SHUT = 1.0
"""No score of a trained gate reaches it."""


@dataclass(frozen=True, slots=True)
class TestSet:
    """What is sent.

    Attributes:
        payloads: One per sample, with its label and its difficulty.
        by_oracle: The same, each asking for the cheapest right answer.
        remark: Where the samples come from.
        digest: Of the samples.
    """

    payloads: tuple[Payload, ...]
    by_oracle: tuple[Payload, ...]
    remark: str
    digest: str


def open_test_set(bundle: Bundle, data: str, data_dir: Path | None, trace: Path | None, threads: int) -> TestSet:
    """Read the test split and run the bundle over it once, or take the trace that was kept."""
    labelled = open_data(data, bundle, "test", data_dir)
    gates = (ALL_OPEN, None, GATES_SHUT)
    recording = Recording(kept=trace, device="cpu", threads=threads, gates=gates)
    recorded: AbstractContextManager[Trace] = traced(bundle, labelled.data, recording)
    with recorded as kept:
        batches = list(labelled.data.batches(BATCH))
        (name,) = batches[0]
        inputs = np.concatenate([batch[name] for batch in batches])
        payloads = payloads_of_arrays(inputs, labelled.data.label_N, doubt(kept))
        wanted = oracle_fields(bundle, kept)
        by_oracle = tuple(replace(payload, fields=fields) for payload, fields in zip(payloads, wanted, strict=True))
        return TestSet(payloads, by_oracle, labelled.remark or data, kept.about.data_digest)


def doubt(trace: Trace) -> np.ndarray:
    """Give how hard each sample is: 1 less the largest probability at the first exit, float64 (N,)."""
    decisions = Outcomes.of(trace).decision_E
    return 1.0 - decisions[0].top_probability_BK[:, 0].astype(np.float64)


def oracle_fields(bundle: Bundle, trace: Trace) -> list[Mapping[str, Any]]:
    """Give what each sample asks for if its label is known: the cheapest right answer, full depth if none is right.

    Of exits, that is the label oracle (survey eq. 9). Of gates, the choice is between all shut, the network's own
    decisions and all open.
    """
    if bundle.manifest.gates:
        return _oracle_of_gates(trace)
    exit_N = first_true_or_last(Outcomes.of(trace).right_NE)
    return [{"policy": {"kind": "fixed", "exit": int(exit_index)}} for exit_index in exit_N]


def _oracle_of_gates(trace: Trace) -> list[Mapping[str, Any]]:
    asked: list[Mapping[str, Any]] = [{"gates": "shut"}, {"gates": "own"}, {"gates": "open"}]
    passes = [trace.pass_at(threshold) for threshold in (GATES_SHUT, None, ALL_OPEN)]
    right_NP = np.stack([one.logits_ENC[-1].argmax(axis=1) == trace.label_N for one in passes], axis=1)
    return [asked[choice] for choice in first_true_or_last(right_NP)]
