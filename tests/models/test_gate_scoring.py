"""What scores gates: from features to one number per row."""

import pytest
import torch
from offramp_models.gates import GATES, FeedForwardGates, RecurrentGates, make_gates


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


IMAGES = torch.rand(3, 1, 8, 8)


def log_odds(gates, *features):
    score = gates.start(IMAGES)
    return [score(each, index) for index, each in enumerate(features)]


def test_unknown_gates_are_refused_with_those_there_are():
    with pytest.raises(ValueError, match="gates 'luck' is not one of feed_forward, recurrent"):
        make_gates("luck")


@pytest.mark.parametrize("name", sorted(GATES))
def test_every_gate_gives_one_number_per_row_and_starts_open(name):
    gates = GATES[name]([4, 6])
    given = log_odds(gates, torch.randn(50, 4, 8, 8), torch.randn(50, 6, 4, 4))
    assert [each.shape for each in given] == [(50,), (50,)]
    assert all(each.sigmoid().mean().item() == pytest.approx(0.85, abs=0.1) for each in given)


@pytest.mark.parametrize("name", sorted(GATES))
def test_a_gate_reads_the_average_over_the_map(name):
    gates, features = GATES[name]([4]), torch.randn(3, 4, 6, 5)
    (given,) = log_odds(gates, features)
    (turned,) = log_odds(gates, features.flip(2).roll(1, dims=3))
    (flat,) = log_odds(gates, features.mean(dim=(2, 3)))
    torch.testing.assert_close(turned, given)
    torch.testing.assert_close(flat, given)


@pytest.mark.parametrize("name", sorted(GATES))
def test_a_row_is_scored_without_regard_to_the_others(name):
    gates, features = GATES[name]([4, 4]), [torch.randn(5, 4), torch.randn(5, 4)]
    together = log_odds(gates, *features)
    for row in range(5):
        alone = log_odds(gates, *(each[row : row + 1] for each in features))
        for one, all_rows in zip(alone, together, strict=True):
            torch.testing.assert_close(one, all_rows[row : row + 1])


def test_a_feed_forward_gate_forgets_and_a_recurrent_one_remembers_what_earlier_gates_read():
    first, other, second = torch.randn(3, 3, 4).unbind()
    for gates, remembers in ((FeedForwardGates([4, 4]), False), (RecurrentGates([4, 4]), True)):
        after_first, after_other = (log_odds(gates, before, second)[1] for before in (first, other))
        assert torch.equal(after_first, after_other) is not remembers


def test_recurrent_gates_start_every_pass_with_nothing_in_mind():
    gates, features = RecurrentGates([4, 4]), torch.randn(2, 3, 4).unbind()
    assert all(torch.equal(*pair) for pair in zip(log_odds(gates, *features), log_odds(gates, *features), strict=True))


def test_recurrent_gates_share_one_cell_and_differ_in_what_they_make_of_their_features():
    gates = RecurrentGates([4] * 10)
    assert sum(p.numel() for p in gates.cell.parameters()) == 4 * 10 * (10 + 10 + 2)
    assert len(gates.inputs) == 10
