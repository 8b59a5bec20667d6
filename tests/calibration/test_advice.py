"""Which exits pay: by hand on drawn outcomes, and timed on a real bundle with one head heavier than the network."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offramp_calibration.advice import PathCosts, Setting, advise
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.replay import replay
from offramp_calibration.timing import HeadCost, head_cost, time_stages
from offramp_calibration.trace import About, Trace
from offramp_cli import exit_advice
from offramp_cli.exit_advice import advise_exits, merge_exits
from offramp_contract.errors import CalibrationError, InvalidValue
from offramp_contract.policy_spec import (
    AgreementSpec,
    AllOfSpec,
    AnyOfSpec,
    ConfidenceSpec,
    EntropySpec,
    FixedSpec,
    MarginSpec,
    PatienceSpec,
    without_exits,
)
from offramp_exporter import export
from offramp_runtime import Bundle, StageExecutor, open_bundle, open_device, run_all_exits
from offramp_server.engine import Engine
from offramp_server.engine_settings import EngineSettings
from torch import nn

DEVICE = open_device("cpu", threads=1)
NAMES = ["early", "middle", "late", "final"]

seeds = st.integers(0, 2**32 - 1)
thresholds = st.tuples(*[st.floats(0.3, 0.95)] * 3)


def outcomes_of(confidence_EN, right_EN) -> Outcomes:
    """Draw up what two-class exits say: how sure each is of its class, and whether that class is right."""
    label_N = np.zeros(len(right_EN[0]), dtype=np.int64)
    logits_ENC = []
    for confidence_N, right_N in zip(np.asarray(confidence_EN), np.asarray(right_EN), strict=True):
        lead_N = np.log(confidence_N / (1 - confidence_N)) * np.where(right_N, 1, -1)
        logits_ENC.append(np.stack([lead_N, np.zeros_like(lead_N)], axis=1).astype(np.float32))
    depth_E = tuple(np.linspace(0, 1, len(logits_ENC) + 1)[1:].tolist())
    return Outcomes.of(Trace(About("drawn", "0" * 64, "0" * 64, depth_E), label_N, tuple(logits_ENC)))


def drawn(seed: int, num_exits: int = 4) -> Outcomes:
    rng = np.random.default_rng(seed)
    return outcomes_of(rng.uniform(0.5, 0.99, (num_exits, 40)), rng.random((num_exits, 40)) < 0.7)


def never(spec, index: int):
    """Let a policy never fire at one exit, as far as moderate scores go."""
    if isinstance(spec, AllOfSpec | AnyOfSpec):
        return spec.model_copy(update={"of": tuple(never(member, index) for member in spec.of)})
    bar = 0.0 if isinstance(spec, EntropySpec) else 1.0
    return spec.model_copy(update={"threshold": (*spec.threshold[:index], bar, *spec.threshold[index + 1 :])})


plain = st.one_of(*(st.builds(kind, threshold=thresholds) for kind in (ConfidenceSpec, EntropySpec, MarginSpec)))
combined = st.one_of(*(st.builds(kind, of=st.tuples(plain, plain)) for kind in (AllOfSpec, AnyOfSpec)))


@given(seed=seeds, spec=plain | combined, index=st.integers(0, 2))
def test_without_an_exit_rows_leave_as_if_its_threshold_were_never_reached(seed, spec, index) -> None:
    outcomes = drawn(seed)

    masked = replay(without_exits(spec, {index}, 4), outcomes.without_exits({index}))

    whole = replay(never(spec, index), outcomes)
    np.testing.assert_array_equal(masked.exit_N + (masked.exit_N >= index), whole.exit_N)
    np.testing.assert_array_equal(masked.class_N, whole.class_N)
    assert masked.compute == pytest.approx(whole.compute)


@given(seed=seeds, spec=plain | combined, dropped=st.sets(st.integers(0, 2), min_size=1))
def test_dropping_exits_one_by_one_is_dropping_them_at_once(seed, spec, dropped) -> None:
    outcomes, one_by_one, left = drawn(seed), spec, drawn(seed)
    for index in sorted(dropped, reverse=True):
        one_by_one = without_exits(one_by_one, {index}, left.num_exits)
        left = left.without_exits({index})

    assert one_by_one == without_exits(spec, dropped, 4)
    at_once = outcomes.without_exits(dropped)
    np.testing.assert_array_equal(left.class_NE, at_once.class_NE)
    np.testing.assert_array_equal(left.depth_E, at_once.depth_E)


@pytest.mark.parametrize(
    ("spec", "dropped", "wanted"),
    [
        (ConfidenceSpec(threshold=(0.1, 0.2, 0.3)), {1}, ConfidenceSpec(threshold=(0.1, 0.3))),
        (ConfidenceSpec(threshold=0.7), {0, 1}, ConfidenceSpec(threshold=0.7)),
        (ConfidenceSpec(threshold=(0.1, 0.2, 0.3)), {0, 1, 2}, ConfidenceSpec(threshold=0.1)),  # which nothing reads
        (AgreementSpec(threshold=(0.1, 0.2, 0.3)), {0, 2}, AgreementSpec(threshold=(0.2,))),
        (PatienceSpec(patience=2), {1}, PatienceSpec(patience=2)),
        (FixedSpec(exit=2), {0}, FixedSpec(exit=1)),
        (FixedSpec(exit=1), {1}, FixedSpec(exit=1)),  # the next exit that stays
        (FixedSpec(exit=2), {1, 2}, FixedSpec(exit=1)),
        (FixedSpec(exit=0), {1, 2}, FixedSpec(exit=0)),
        (AnyOfSpec(of=(FixedSpec(exit=3), MarginSpec())), {0}, AnyOfSpec(of=(FixedSpec(exit=2), MarginSpec()))),
    ],
)
def test_a_policy_is_written_anew_for_the_exits_that_stay(spec, dropped, wanted) -> None:
    assert without_exits(spec, dropped, 4) == wanted


def test_a_policy_that_does_not_fit_the_whole_network_is_refused() -> None:
    with pytest.raises(InvalidValue, match="one number per non-final exit, 3 for this model"):
        without_exits(ConfidenceSpec(threshold=(0.5, 0.5)), {0}, 4)


def costs_of(*head_ms: float, noise_ms: float = 0.01) -> PathCosts:
    """Exits at 1, 2, 3 and 4 ms and as many hundred operations; a head's operations are 100 a millisecond."""
    heads = tuple(HeadCost(int(100 * ms), ms, noise_ms) for ms in head_ms)
    return PathCosts(np.arange(1, 5) * 100.0, np.arange(1, 5) * 1.0, heads, 8)


SURE, UNSURE = 0.99, 0.6


@pytest.fixture
def ten_rows() -> Outcomes:
    """At a threshold of 0.9 four rows leave early (one wrongly), none in the middle, four late, two finally."""
    confidence_EN = np.full((4, 10), UNSURE)
    confidence_EN[0, :4] = confidence_EN[2, :8] = SURE
    right_EN = np.ones((4, 10), dtype=bool)
    right_EN[0, 0] = False
    return outcomes_of(confidence_EN, right_EN)


def test_an_exits_utility_is_what_lies_behind_it_less_its_head_for_all_that_pass(ten_rows: Outcomes) -> None:
    advice = advise(ten_rows, ConfidenceSpec(threshold=0.9), NAMES, costs_of(0.25, 0.5, 0.5))
    early, middle, late = advice.exits

    assert (early.reach, early.exit_rate, early.behind_ms) == (1.0, 0.4, 2.0), "without it they leave at the late exit"
    assert early.utility_ms == pytest.approx(0.4 * 2.0 - 1.0 * 0.25)
    assert early.utility_compute == pytest.approx(0.4 * 0.5 - 1.0 * 25 / 400)
    assert early.bearable_ms == pytest.approx(0.8)
    assert (early.verdict, early.name, early.accuracy_without) == ("keep", "early", 1.0)
    assert (middle.reach, middle.exit_rate, middle.behind_ms) == (0.6, 0.0, 0.0)
    assert middle.utility_ms == pytest.approx(-0.6 * 0.5)
    assert middle.noise_ms == pytest.approx(0.006)
    assert middle.verdict == "merge"
    assert late.utility_ms == pytest.approx(0.4 * 1.0 - 0.6 * 0.5)
    assert late.verdict == "keep"
    assert advice.now.accuracy == 0.9
    assert advice.now.ms == pytest.approx(0.4 * 1 + 0.4 * 3 + 0.2 * 4)


def test_merging_a_useless_exit_saves_its_head_and_changes_no_answer(ten_rows: Outcomes) -> None:
    advice = advise(ten_rows, ConfidenceSpec(threshold=(0.9, 0.9, 0.9)), NAMES, costs_of(0.25, 0.5, 0.5))

    assert advice.merge == (1,)
    assert advice.merged is not None
    assert advice.merged.accuracy == advice.now.accuracy
    assert advice.merged.ms == pytest.approx(advice.now.ms - 0.6 * 0.5)
    assert advice.merged.compute == pytest.approx(advice.now.compute - 0.6 * 50 / 400)


def test_an_exit_that_pays_only_beside_a_bad_one_is_judged_again_once_that_is_gone(ten_rows: Outcomes) -> None:
    # Late is the worse: 0.4 * 1 - 0.6 * 0.85 = -0.11, early is 0.4 * 2 - 1.0 * 0.85 = -0.05. Once late and its head are
    # gone, 3 - 0.85 ms lie behind early: 0.4 * 2.15 - 0.85 = 0.01.
    advice = advise(ten_rows, ConfidenceSpec(threshold=0.9), NAMES, costs_of(0.85, 0.0, 0.85))

    assert [said.verdict for said in advice.exits] == ["merge", "even", "merge"]
    assert advice.merge == (2,)


def test_what_is_within_the_noise_is_left_alone(ten_rows: Outcomes) -> None:
    advice = advise(ten_rows, ConfidenceSpec(threshold=0.9), NAMES, costs_of(0.25, 0.5, 0.5, noise_ms=0.6))

    assert [said.verdict for said in advice.exits] == ["even", "even", "even"]
    assert advice.merge == ()
    assert advice.merged is None


def test_without_heads_the_advice_says_what_a_head_may_cost(ten_rows: Outcomes) -> None:
    advice = advise(ten_rows, ConfidenceSpec(threshold=0.9), NAMES, costs_of())

    assert [said.verdict for said in advice.exits] == ["unknown"] * 3
    assert [said.bearable_ms for said in advice.exits] == pytest.approx([0.8, 0.0, 0.4 / 0.6])
    assert [said.utility_ms for said in advice.exits] == [None] * 3
    assert advice.merge == ()


@given(seed=seeds, spec=plain | combined | st.builds(PatienceSpec, patience=st.integers(1, 3)))
def test_merging_never_makes_an_average_row_slower_than_it_was(seed, spec) -> None:
    rng = np.random.default_rng(seed)

    advice = advise(drawn(seed), spec, NAMES, costs_of(*rng.uniform(0, 0.9, 3)))

    assert advice.merged is None or advice.merged.ms < advice.now.ms


class HeavyHead(nn.Module):
    """Three exits, of which the second has a head far heavier than all the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        heavy = nn.Sequential(nn.Linear(12, 1500), nn.ReLU(), nn.Linear(1500, 1500), nn.ReLU(), nn.Linear(1500, 5))
        self.heads = nn.ModuleList([nn.Linear(12, 5), heavy, nn.Linear(12, 5)])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        logits = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = x + torch.tanh(2 * block(x))
            logits.append(3 * head(x))
        return logits


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = HeavyHead().eval()
    return export(network, torch.zeros(2, 12), tmp_path_factory.mktemp("heavy") / "heavy")


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(64, 12)).astype(np.float32)


def recorded(bundle: Bundle, x: np.ndarray) -> Outcomes:
    exits = run_all_exits(StageExecutor(bundle, DEVICE), {"x": x})
    about = About(bundle.manifest.name, bundle.manifest.model_digest, "0" * 64, bundle.manifest.exit_depths)
    label_N = exits[-1][0].argmax(axis=1).astype(np.int64)
    return Outcomes.of(Trace(about, label_N, tuple(logits for logits, _ in exits)))


NOBODY_IN_THE_MIDDLE = ConfidenceSpec(threshold=(0.6, 1.0))


def test_a_heavy_head_where_nobody_leaves_is_advised_against_and_merged_away(
    heavy: Bundle, rows: np.ndarray, tmp_path: Path
) -> None:
    outcomes = recorded(heavy, rows)

    advice = advise_exits(heavy, outcomes, NOBODY_IN_THE_MIDDLE, DEVICE, {"x": rows[:8]})
    merged = merge_exits(heavy, advice.merge, tmp_path / "merged", examples={"x": rows})

    assert advice.exits[1].exit_rate == 0.0
    assert advice.exits[1].verdict == "merge"
    assert 1 in advice.merge
    assert advice.batch_size == 8
    assert advice.note is None
    head_flops = 1500 * (2 * 12 + 1) + 1500 + 1500 * (2 * 1500 + 1) + 1500 + 5 * (2 * 1500 + 1) + 5
    assert advice.exits[1].head_compute == pytest.approx(head_flops / heavy.manifest.full_flops)
    assert advice.merged is not None
    assert advice.merged.compute < advice.now.compute
    assert merged.manifest.full_flops <= heavy.manifest.full_flops - head_flops


def test_the_merged_bundle_answers_through_the_engine_as_the_advice_replays_it(
    heavy: Bundle, rows: np.ndarray, tmp_path: Path
) -> None:
    merge_exits(heavy, [1], tmp_path / "merged")
    spec = without_exits(ConfidenceSpec(threshold=(0.6, 0.7)), {1}, 3)
    replayed = replay(spec, recorded(heavy, rows).without_exits({1}))

    settings = EngineSettings(default_latency_ms=None, max_wait_ms=1e6, warm_up_s=0.2)
    with Engine.open(tmp_path / "merged", "cpu", settings) as engine:
        answers = [row.answer for row in engine.classify(rows, policy=spec.model_dump(mode="json")).rows]

    near_N = np.abs(recorded(heavy, rows).decision_E[0].log_odds_B - np.log(0.6 / 0.4)) < 1e-4
    exit_N = np.array([answer.exit_index for answer in answers])
    np.testing.assert_array_equal(exit_N[~near_N], replayed.exit_N[~near_N])
    assert set(exit_N) == {0, 1}


def test_without_torch_the_advice_says_what_is_missing(
    heavy: Bundle, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = recorded(heavy, rows)
    for name in [name for name in sys.modules if name.split(".")[0] == "offramp_exporter"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)

    advice = advise_exits(heavy, outcomes, ConfidenceSpec(threshold=0.6), DEVICE, {"x": rows[:2]})

    assert advice.note is not None
    assert "pip install 'offramp[export]'" in advice.note
    assert {said.verdict for said in advice.exits} == {"unknown"}


def test_a_merge_that_turns_out_no_faster_is_not_advised(
    heavy: Bundle, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_it_is = Setting(accuracy=1.0, compute=1.0, ms=1.0)
    monkeypatch.setattr(exit_advice, "_measured", lambda *_: (as_it_is, as_it_is))

    advice = advise_exits(heavy, recorded(heavy, rows), NOBODY_IN_THE_MIDDLE, DEVICE, {"x": rows[:8]})

    assert advice.exits[1].verdict == "merge"
    assert (advice.merge, advice.merged) == ((), None)
    assert advice.note is not None
    assert "no faster" in advice.note


def test_times_add_up_along_the_stages_and_are_per_row(heavy: Bundle, rows: np.ndarray) -> None:
    (times,) = time_stages([heavy], DEVICE, {"x": rows[:4]}, rounds=3)
    fixed = replace(times, ms_RK=np.array([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [9.0, 9.0, 9.0]]))

    assert times.ms_RK.shape == (3, 3)
    assert (times.ms_RK > 0).all()
    np.testing.assert_allclose(fixed.ms_to_exit_E, [0.25, 0.75, 1.75])
    np.testing.assert_allclose(fixed.ms_between(-1, 1), [0.75, 0.75, 4.5])
    np.testing.assert_allclose(fixed.ms_between(0, 2), [1.5, 1.5, 4.5])


def test_a_heads_cost_is_the_median_of_what_differs_within_a_round(heavy: Bundle) -> None:
    fewer = open_merged(heavy, 1)
    (whole, without) = time_stages([heavy, fewer], DEVICE, {"x": np.zeros((1, 12), np.float32)}, rounds=3)
    # The second round was slow for both alike; the exit costs 2, 2 and 3.
    whole = replace(whole, ms_RK=np.array([[1.0, 3.0, 1.0], [9.0, 30.0, 10.0], [1.0, 4.0, 1.0]]))
    without = replace(without, ms_RK=np.array([[1.0, 2.0], [9.0, 38.0], [1.0, 2.0]]))

    cost = head_cost(whole, without, 1)

    assert cost.ms == 2.0
    assert cost.noise_ms == 0.0
    assert cost.flops == heavy.manifest.full_flops - fewer.manifest.full_flops


def open_merged(bundle: Bundle, index: int) -> Bundle:
    from offramp_exporter.merge import without_exits as merged_bundle

    return merged_bundle(bundle, {index})


@pytest.mark.parametrize("rounds", [0, 10_001])
def test_timing_needs_rounds_and_rows(rounds: int, exported: Path) -> None:
    bundle = open_bundle(exported)

    with pytest.raises(CalibrationError, match="1 to 10000 rounds and at least one row"):
        time_stages([bundle], DEVICE, {"x": np.zeros((1, 12), np.float32)}, rounds=rounds)
    with pytest.raises(CalibrationError, match="at least one row"):
        time_stages([bundle], DEVICE, {"x": np.zeros((0, 12), np.float32)})
