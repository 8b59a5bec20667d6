"""How gates decide while they learn: each as its equations say."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offramp_models.gates import (
    HARD,
    RELAXATIONS,
    GumbelSoftmax,
    Sampled,
    SemanticHashing,
    gate,
    relaxation,
)
from offramp_models.gates.relaxations import _gumbel
from offramp_models.training.reinforce import reinforce_loss
from torch.nn import functional

MANY = 20_000
LOG_ODDS = st.floats(-4, 4)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def leaf(values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_an_unknown_relaxation_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="gate relaxation 'luck' is not one of gumbel, "):
        relaxation("luck")


def test_straight_through_decides_as_it_serves_and_hands_the_score_the_gradient():
    log_odds = leaf([-2.0, 0.0, 0.3])
    choice = HARD(log_odds, 0)
    assert torch.equal(choice.decision_B, gate(torch.sigmoid(log_odds)))
    assert choice.decision_B.tolist() == [0, 1, 1]
    choice.decision_B.sum().backward()
    score = torch.sigmoid(log_odds.detach())
    torch.testing.assert_close(log_odds.grad, score * (1 - score))


@settings(deadline=None)
@given(LOG_ODDS, st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 2**31))
def test_gumbel_softmax_is_that_of_two_classes_with_noise_each(log_odds, temperature, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        noise = [-torch.empty(3, dtype=torch.float64).exponential_().log() for _ in range(2)]
        torch.manual_seed(seed)
        ours = leaf([log_odds] * 3)
        choice = GumbelSoftmax(temperature)(ours, 0)
    theirs = leaf([log_odds] * 3)
    classes = torch.stack([functional.logsigmoid(theirs) + noise[0], functional.logsigmoid(-theirs) + noise[1]])
    soft = torch.softmax(classes / temperature, dim=0)[0]  # survey eq. 22
    assert torch.equal(choice.decision_B, (classes[0] >= classes[1]).double())
    choice.decision_B.sum().backward()
    soft.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_gumbel_noise_is_minus_the_log_of_minus_the_log_of_a_uniform_number():
    noise = np.sort(_gumbel(torch.empty(MANY, dtype=torch.float64)).numpy())
    uniform = np.exp(-np.exp(-noise))  # survey eq. 21, turned round
    assert np.abs(uniform - (np.arange(MANY) + 0.5) / MANY).max() < 1.63 / math.sqrt(MANY)  # Kolmogorov, 1 %


@pytest.mark.parametrize("draws", [GumbelSoftmax(), GumbelSoftmax(0.3), Sampled()])
@pytest.mark.parametrize("log_odds", [-1.5, 0.0, 0.7])
def test_a_drawn_gate_is_open_as_often_as_its_score_says(draws, log_odds):
    decisions = draws(torch.full((MANY,), log_odds), 0).decision_B
    score = 1 / (1 + math.exp(-log_odds))
    assert set(decisions.unique().tolist()) == {0.0, 1.0}
    assert abs(decisions.mean().item() - score) < 4 * math.sqrt(score * (1 - score) / MANY)


def test_semantic_hashing_lets_half_of_the_rows_go_on_soft_and_half_hard():
    torch.manual_seed(3)
    noise = torch.randn(40, dtype=torch.float64)
    for noisy, hard in ((0.5, 1.0), (-0.5, 0.0)):
        torch.manual_seed(3)
        decisions = SemanticHashing()(noisy - noise, 0).decision_B
        soft = 1.2 / (1 + math.exp(-noisy)) - 0.1
        assert sorted(decisions.tolist()) == pytest.approx(sorted([soft] * 20 + [hard] * 20))


def test_semantic_hashings_gradient_is_that_of_the_saturating_sigmoid_for_all_rows():
    log_odds = leaf(np.linspace(-6, 6, 40).tolist())
    torch.manual_seed(3)
    noisy = (log_odds.detach() + torch.randn(40, dtype=torch.float64)).requires_grad_()
    torch.manual_seed(3)
    SemanticHashing()(log_odds, 0).decision_B.sum().backward()
    (1.2 * torch.sigmoid(noisy) - 0.1).clamp(0, 1).sum().backward()
    torch.testing.assert_close(log_odds.grad, noisy.grad)
    assert (log_odds.grad == 0).any()
    assert (log_odds.grad > 0).any()


def test_semantic_hashing_draws_anew_which_rows_are_soft():
    log_odds, soft_rows = torch.zeros(64), set()
    for _ in range(3):
        decisions = SemanticHashing()(log_odds, 0).decision_B
        soft_rows.add(tuple(((decisions > 0) & (decisions < 1)).tolist()))
    assert len(soft_rows) == 3


def test_a_sampled_decision_passes_no_gradient_and_keeps_its_log_probability():
    log_odds = leaf([-0.4, 0.9, 0.0, 2.0])
    choice = Sampled()(log_odds, 0)
    assert not choice.decision_B.requires_grad
    score = torch.sigmoid(log_odds)
    expected = torch.where(choice.decision_B == 1, score.log(), (1 - score).log())
    torch.testing.assert_close(choice.log_prob_B, expected)


def test_only_sampled_decisions_keep_log_probabilities():
    kept = {name for name, relax in RELAXATIONS.items() if relax(torch.zeros(4), 0).log_prob_B is not None}
    assert not kept & {"gumbel", "semantic_hashing", "straight_through"}


@settings(deadline=None)
@given(
    st.lists(LOG_ODDS, min_size=1, max_size=4),
    st.integers(0, 2**31),
    st.floats(-3, 3),
)
def test_reinforces_mean_gradient_is_that_of_the_expected_reward_whatever_the_baseline(odds, seed, baseline):
    log_odds = leaf(odds)
    patterns = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(odds))), dtype=torch.float64)
    rewards = torch.from_numpy(np.random.default_rng(seed).normal(size=len(patterns)))
    score = torch.sigmoid(log_odds)
    probs = torch.where(patterns == 1, score, 1 - score).prod(dim=1)
    (expected,) = torch.autograd.grad((probs * rewards).sum(), log_odds, retain_graph=True)

    log_probs = functional.logsigmoid(torch.where(patterns == 1, log_odds, -log_odds))
    mean = torch.zeros_like(log_odds)
    for row, prob in enumerate(probs.detach()):
        one = slice(row, row + 1)
        loss = reinforce_loss(log_probs[one], rewards[one, None], torch.tensor([[baseline]], dtype=torch.float64))
        mean -= prob * torch.autograd.grad(loss, log_odds, retain_graph=True)[0]
    torch.testing.assert_close(mean, expected)


def test_reinforce_averages_over_rows_and_adds_up_over_gates():
    log_probs = leaf([[-0.1, -0.2], [-0.3, -0.4]])
    rewards, baselines = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[0.5, 0.5], [1.0, 1.0]])
    loss = reinforce_loss(log_probs, rewards, baselines)
    assert loss.item() == pytest.approx(-((0.5 * -0.1 + 1.5 * -0.2) + (2 * -0.3 + 4 * -0.4)) / 2)
