import numpy as np
import pytest
from offramp_loadtest import Difficulty, LoadTestError, payloads_of_arrays, read_payloads
from offramp_loadtest.difficulty import choose, with_scores

N = 1000
SCORES = np.random.default_rng(0).permutation(N).astype(np.float64)
PAYLOADS = payloads_of_arrays(np.zeros((N, 1)), np.zeros(N, int), SCORES)
DUE_S = np.linspace(0.0, 10.0, 4000, endpoint=False)


def asked(drift):
    """Give the difficulty of what is asked at each moment, from 0 to 1."""
    return SCORES[choose(PAYLOADS, DUE_S, 10.0, drift, seed=3)] / N


def test_without_drift_every_payload_comes_once_before_one_comes_again():
    chosen = choose(PAYLOADS, DUE_S, 10.0, Difficulty(), seed=3)
    assert sorted(chosen[:N]) == list(range(N))
    assert chosen[N : 2 * N] == chosen[:N]
    assert chosen != choose(PAYLOADS, DUE_S, 10.0, Difficulty(), seed=4)


def test_a_linear_drift_goes_from_easy_to_hard_within_its_spread():
    hard = asked(Difficulty(drift="linear", spread=0.2))
    assert hard[:200].max() <= 0.25
    assert hard[-200:].min() >= 0.75
    assert np.polyfit(DUE_S, hard, 1)[0] == pytest.approx(0.08, rel=0.05)


def test_a_sine_starts_in_the_middle_and_swings_between_its_bounds():
    hard = asked(Difficulty(drift="sine", period_s=10.0, low=0.2, high=1.0, spread=0.1)).reshape(40, 100).mean(axis=1)
    assert hard[0] == pytest.approx(0.6, abs=0.08)
    assert hard.argmax() == pytest.approx(10, abs=2)
    assert hard.argmin() == pytest.approx(30, abs=2)
    assert hard.min() == pytest.approx(0.05 + 0.2 * 0.9, abs=0.05)


def test_a_drift_over_inputs_of_unknown_difficulty_is_refused():
    with pytest.raises(LoadTestError, match="the data needs an array 'difficulty'"):
        choose(payloads_of_arrays(np.zeros((3, 1))), DUE_S, 10.0, Difficulty(drift="linear"), seed=0)


def test_scores_come_from_the_data_an_array_or_the_doubt_of_a_traces_first_exit(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 1)), y=[0, 1], difficulty=[0.5, 0.25])
    assert [payload.difficulty for payload in read_payloads(tmp_path / "d.npz")] == [0.5, 0.25]
    two = payloads_of_arrays(np.zeros((2, 1)))
    np.save(tmp_path / "s.npy", [3.0, 4.0])
    assert [payload.difficulty for payload in with_scores(two, tmp_path / "s.npy")] == [3.0, 4.0]
    np.savez(tmp_path / "t.npz", label=[0, 1], logits_0=np.log([[0.9, 0.1], [0.4, 0.6]]), logits_1=np.zeros((2, 2)))
    assert [payload.difficulty for payload in with_scores(two, tmp_path / "t.npz")] == pytest.approx([0.1, 0.4])


def test_scores_that_do_not_fit_are_refused_in_a_sentence(tmp_path):
    two = payloads_of_arrays(np.zeros((2, 1)))
    np.save(tmp_path / "short.npy", [1.0])
    np.savez(tmp_path / "other.npz", z=[1.0, 2.0])
    np.save(tmp_path / "nan.npy", [1.0, np.nan])
    for name, sentence in {
        "short.npy": "a finite number for each of 2 inputs",
        "nan.npy": "a finite number for each of 2 inputs",
        "other.npz": "holds neither an array 'difficulty' nor a trace",
        "none.npz": "No such file",
    }.items():
        with pytest.raises(LoadTestError, match=sentence):
            with_scores(two, tmp_path / name)
    with pytest.raises(LoadTestError, match="must hold one number for each of 2 inputs"):
        payloads_of_arrays(np.zeros((2, 1)), difficulty=[1.0])
