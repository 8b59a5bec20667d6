import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offramp_models import load_data
from offramp_models.gates import HARD, GatedPass
from offramp_models.networks import BlockDrop, create_network
from offramp_models.training import Lesson, TrainingSettings, create_method, train
from offramp_models.training.curriculum_policy_gradient import (
    EXPLORATION,
    Curriculum,
    Replay,
    num_free,
    reward,
)
from offramp_models.training.losses import weighted_loss
from offramp_models.training.method import GatedLesson

SETTINGS = TrainingSettings(method="curriculum_policy_gradient")
TINY = {"widths": (4, 6), "blocks": 2, "policy_width": 2}
LABELS = torch.tensor([0, 0])


def tiny(seed=0, **changes):
    return create_network("blockdrop", seed, input_shape=(1, 8, 8), num_classes=10, knobs=TINY | changes)


def answering(decisions_BG):
    """Be right (class 0) where the first of two gates is open, whatever the second."""
    right_B = decisions_BG[:, 0]
    return torch.stack([right_B, 1 - right_B], dim=1)


def lesson_of(log_odds_G, decisions_BG, progress):
    """Give a lesson of a network of two gates with these log-odds, that drew these decisions."""
    log_odds_BG = log_odds_G.expand(len(decisions_BG), 2)
    score_BG = torch.sigmoid(log_odds_BG)
    probability_BG = EXPLORATION * score_BG + (1 - EXPLORATION) * (1 - score_BG)
    log_probs_BG = torch.where(decisions_BG > 0.5, probability_BG, 1 - probability_BG).log()
    passed = GatedPass([answering(decisions_BG)], score_BG, decisions_BG, log_probs_BG)

    def rehearse(relax):
        decided_BG = torch.stack([relax(log_odds_BG[:, index], index).decision_B for index in range(2)], dim=1).detach()
        return GatedPass([answering(decided_BG)], score_BG, decided_BG)

    labels_B = LABELS[:1].expand(len(decisions_BG))
    return Lesson(passed.logits_EBC, labels_B, progress, GatedLesson(passed, (0.4, 0.4), rehearse))


@given(st.integers(1, 60))
def test_the_curriculum_frees_one_block_after_the_other_from_the_last(num_gates):
    freed = [num_free(step / 1000, num_gates) for step in range(1000)]
    assert freed[0] == freed[399] == 0
    assert freed[400] == 1
    assert set(freed) == set(range(num_gates + 1))
    assert freed == sorted(freed)
    assert freed[700:] == [num_gates] * 300
    shares = [freed.count(free) for free in range(1, num_gates)]
    assert max(shares, default=0) - min(shares, default=0) <= 2  # a thousand steps do not divide evenly


def test_blocks_that_are_not_free_stay_open_and_are_not_praised_or_blamed():
    log_odds = torch.full((500,), -9.0)
    relax = Curriculum(2)
    for index in range(2):
        choice = relax(log_odds, index)
        assert choice.decision_B.eq(1).all()
        assert choice.log_prob_B.eq(0).all()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        free = relax(log_odds, 2)
    assert free.decision_B.mean() == pytest.approx(1 - EXPLORATION, abs=0.06)
    probability = torch.where(free.decision_B > 0.5, 1 - EXPLORATION, EXPLORATION)
    torch.testing.assert_close(free.log_prob_B, probability.log(), atol=1e-3, rtol=0)


def test_the_reward_falls_with_the_square_of_the_share_of_blocks_and_a_wrong_answer_costs_1():
    decisions_BG = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    logits_BC = torch.tensor([[2.0, 1], [2, 1], [2, 1], [1, 2]])
    passed = GatedPass([torch.zeros(4, 2), logits_BC], decisions_BG, decisions_BG)
    rewards = reward(passed, torch.zeros(4, dtype=torch.long), saving_weight=2.0)
    torch.testing.assert_close(rewards, torch.tensor([1.5, 0, 2, -1]))


def test_over_all_draws_the_gradient_is_that_of_the_expected_reward():
    log_odds_G = torch.tensor([0.3, 0.8], requires_grad=True)
    score_G = torch.sigmoid(log_odds_G)
    probability_G = EXPLORATION * score_G + (1 - EXPLORATION) * (1 - score_G)
    method, surrogate, expected = create_method(SETTINGS), 0.0, 0.0
    for draw in itertools.product((0.0, 1.0), repeat=2):
        decisions_BG = torch.tensor([draw])
        weight = torch.where(decisions_BG[0] > 0.5, probability_G, 1 - probability_G).prod()
        surrogate = surrogate + weight.detach() * method(lesson_of(log_odds_G, decisions_BG, 0.69))
        passed = GatedPass([answering(decisions_BG)], decisions_BG, decisions_BG)
        expected = expected + weight * reward(passed, LABELS[:1], SETTINGS.gate_weight)[0]
    (found,) = torch.autograd.grad(surrogate, log_odds_G, retain_graph=True)
    (closed_form,) = torch.autograd.grad(-expected, log_odds_G)
    torch.testing.assert_close(found, closed_form)


def test_draws_are_praised_for_what_they_earn_above_the_policys_own_decisions():
    log_odds_G = torch.tensor([0.3, -0.8])  # by itself the policy opens the first alone and is right: 0.75
    decisions_BG = torch.tensor([[1.0, 1], [1, 0], [0, 1], [0, 0]])
    lesson = lesson_of(log_odds_G, decisions_BG, 0.69)
    log_probs_B = lesson.gated.passed.log_probs_BG.sum(dim=1)
    expected = -(torch.tensor([-0.75, 0.0, -1.75, -1.75]) * log_probs_B).mean()
    torch.testing.assert_close(create_method(SETTINGS)(lesson), expected)


def test_in_the_curriculum_the_policys_own_decisions_leave_the_first_gates_open_too():
    log_odds_G = torch.tensor([-0.3, -0.8])  # one gate is free: by itself the policy opens the first alone, as kept
    decisions_BG = torch.tensor([[1.0, 0], [1, 1]])
    lesson = lesson_of(log_odds_G, decisions_BG, 0.41)
    log_probs_B = lesson.gated.passed.log_probs_BG.sum(dim=1)
    expected = -(torch.tensor([0.0, -0.75]) * log_probs_B).mean()
    torch.testing.assert_close(create_method(SETTINGS)(lesson), expected)


def test_the_method_draws_the_gates_that_are_free_and_keeps_the_others_open():
    method = create_method(SETTINGS)
    kept = [method.relaxation(progress, 10).num_open for progress in (0.0, 0.39, 0.4, 0.55, 0.69, 0.7, 0.99)]
    assert kept == [10, 10, 9, 4, 0, 0, 0]
    assert not method.relaxation(0.55, 10).is_hard


def test_the_backbone_learns_first_then_the_policy_then_both():
    log_odds_G, decisions_BG = torch.tensor([0.3, 0.8]), torch.tensor([[1.0, 0]])
    method = create_method(SETTINGS)
    classified = weighted_loss([answering(decisions_BG)], LABELS[:1])
    policy = method(lesson_of(log_odds_G, decisions_BG, 0.69))
    torch.testing.assert_close(method(lesson_of(log_odds_G, decisions_BG, 0.39)), classified)
    torch.testing.assert_close(method(lesson_of(log_odds_G, decisions_BG, 0.7)), classified + policy)
    assert not torch.isclose(policy, classified)


def test_in_the_curriculum_the_backbone_gets_no_gradient():
    network, method, images = tiny(), create_method(SETTINGS), torch.rand(6, 1, 8, 8)
    labels = torch.arange(6)
    passed = network.pass_gates(images, method.relaxation(0.6, 4))

    def rehearse(relax):
        with torch.no_grad():
            return network.eval().pass_gates(images, relax)

    gated = GatedLesson(passed, network.gate_costs_G, rehearse)
    method(Lesson(passed.logits_EBC, labels, 0.6, gated)).backward()
    learning = {key for key, weight in network.named_parameters() if weight.grad is not None}
    assert learning == {key for key, _ in network.named_parameters() if key.startswith("gates.")}


def test_decisions_can_be_replayed():
    network, images = tiny().eval(), torch.rand(3, 1, 8, 8)
    decisions_BG = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    passed = network.pass_gates(images, Replay(decisions_BG))
    assert torch.equal(passed.decisions_BG, decisions_BG)
    alone = network.pass_gates(images[:1], Replay(decisions_BG[:1]))
    torch.testing.assert_close(passed.logits_EBC[0][:1], alone.logits_EBC[0])


def test_a_trained_policy_uses_fewer_blocks_than_all_and_the_answers_hold():
    data, network = load_data("digits"), tiny(widths=(6, 12), policy_width=4)
    settings = TrainingSettings(method="curriculum_policy_gradient", epochs=8, gate_weight=2.0)
    record = train(network, data, settings)
    assert record.test_accuracy_E[0] > 0.85
    assert record.test_gates.open_share < 0.9


def test_all_decisions_are_made_before_the_first_block_runs():
    network, images = tiny().eval(), torch.rand(3, 1, 8, 8)
    before = network.pass_gates(images).scores_BG
    for weight in (*network.blocks.parameters(), *network.stem.parameters()):
        torch.nn.init.normal_(weight)
    assert torch.equal(network.pass_gates(images).scores_BG, before)
    assert torch.equal(network.pass_gates(images, HARD).scores_BG, before)


def test_the_policy_network_is_a_small_part_of_the_work():
    network = BlockDrop()
    blocks = sum(network.gate_costs_G)
    assert 0.85 < blocks < 1
