import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_contract.errors import InvalidValue
from offramp_contract.gates import OPEN, SHUT, StagePath, gate_thresholds, opened
from offramp_contract.manifest import Manifest


@pytest.fixture
def manifest(gated: dict[str, Any]) -> Manifest:
    return Manifest.model_validate(gated)


def chosen(gated: dict[str, Any], *priorities: float) -> Manifest:
    """Give a network whose depth is the caller's choice: one body for each priority."""
    body = gated["stages"].pop(1)
    gated["stages"][0]["scores"] = None
    before = "h0"
    for index in range(len(priorities)):
        name = f"h0_after_body_{index}"
        gated["carries"].append({"name": name, "dtype": "float32", "shape": [5]})
        merges = [{"run": name, "skip": before}]
        gated["stages"].insert(
            1 + index,
            {**body, "name": name, "inputs": [before], "outputs": [name], "gates": [index], "merges": merges},
        )
        before = name
    gated["exits"][1]["stage"] = 2 + len(priorities)
    gated["gates"] = [
        {"name": f"gate_{index}", "priority": priority, "threshold": 0.5} for index, priority in enumerate(priorities)
    ]
    return Manifest.model_validate(gated)


def test_the_networks_own_thresholds_hold_where_nothing_is_asked(manifest: Manifest) -> None:
    assert gate_thresholds(manifest).tolist() == [0.5]
    assert gate_thresholds(manifest, "own", 0.25).tolist() == [0.25]
    assert gate_thresholds(manifest, "own", [0.75]).tolist() == [0.75]


@given(st.floats(0, 1, width=32))
def test_open_and_shut_hold_for_every_score(score: float) -> None:
    scores = np.array([score], dtype=np.float32)
    assert opened(scores, np.array([OPEN])).all()
    assert not opened(scores, np.array([SHUT])).any()


def test_a_score_at_the_threshold_opens_and_none_opens_nothing() -> None:
    scores, thresholds = np.array([0.5, 0.25, np.nan], dtype=np.float32), np.array([0.5, 0.5, 0.0])
    assert opened(scores, thresholds).tolist() == [True, False, False]


def test_a_count_keeps_the_most_important_blocks(gated: dict[str, Any]) -> None:
    network = chosen(gated, 0.9, 0.6, 0.9, 1.0)
    path = StagePath(network)
    kept = [path.open_at_start(gate_thresholds(network, count)) for count in range(5)]
    assert [[index for index, is_open in enumerate(row) if is_open] for row in kept] == [
        [],
        [3],
        [0, 3],
        [0, 2, 3],
        [0, 1, 2, 3],
    ]
    assert path.open_at_start(gate_thresholds(network, "own", 0.9)) == (True, False, True, True)


@pytest.mark.parametrize(
    ("gates", "threshold", "sentence"),
    [
        (1, None, "gates: a count is for networks whose depth is the caller's choice"),
        ("open", 0.5, "gates: 'open' leaves nothing for gate_threshold to decide"),
        ("own", 1.5, "gate_threshold: one number from 0 to 1"),
        ("own", float("nan"), "gate_threshold: one number from 0 to 1"),
        ("own", [0.5, 0.5], "gate_threshold: one number from 0 to 1, or 1 of them"),
    ],
)
def test_what_gates_cannot_do_is_refused_by_name(manifest: Manifest, gates: Any, threshold: Any, sentence: str) -> None:
    with pytest.raises(InvalidValue, match=sentence):
        gate_thresholds(manifest, gates, threshold)


def test_a_count_beyond_the_gates_is_refused(gated: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match="gates: a count must be 0 to 2"):
        gate_thresholds(chosen(gated, 0.5, 0.7), 3)


def test_a_network_without_gates_has_no_knobs_for_them(written: dict[str, Any]) -> None:
    plain = Manifest.model_validate(written)
    with pytest.raises(InvalidValue, match="gate_threshold: this model has no gates"):
        gate_thresholds(plain, "own", 0.5)
    with pytest.raises(InvalidValue, match="gates: this model has no gates"):
        gate_thresholds(plain, "shut")


@pytest.mark.parametrize("is_open", list(itertools.product([False, True], repeat=3)))
def test_a_row_runs_trunk_and_the_bodies_whose_gates_are_open(gated: dict[str, Any], is_open: tuple[bool, ...]) -> None:
    network = chosen(gated, 0.5, 0.6, 0.7)
    path, stage, ran, aliases = StagePath(network), -1, [], []
    while True:
        following = path.following(stage, is_open)
        skipped = network.stages[stage + 1 : following]
        aliases += [(merge.run, merge.skip) for one in skipped for merge in one.merges]
        stage = following
        if stage == len(network.stages):
            break
        ran.append(stage)
    assert ran == [0, *(1 + gate for gate in range(3) if is_open[gate]), 4, 5]
    names = ["h0", "h0_after_body_0", "h0_after_body_1", "h0_after_body_2"]
    assert aliases == [(names[gate + 1], names[gate]) for gate in range(3) if not is_open[gate]]
