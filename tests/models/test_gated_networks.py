"""Networks with gates: hard and repeatable as they are served, open to gradients as they learn."""

import json
from itertools import pairwise

import pytest
import torch
from offramp_models.gates import HARD, RELAXATIONS, Choice, Sampled
from offramp_models.networks import GatedNetwork, NetworkPlan, create_network, plan_network
from torch import nn

TINY = {"widths": [4, 6], "blocks": 2}
KINDS = [("skipnet", "feed_forward"), ("skipnet", "recurrent"), ("convnet_aig", None)]


def tiny(name="skipnet", gates=None, **knobs):
    """A tiny network whose gates are open for some rows and shut for others."""
    network = create_network(name, 3, input_shape=(1, 8, 8), num_classes=5, knobs=TINY | knobs, gates=gates)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for module in network.gates.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=3.0)
                nn.init.zeros_(module.bias)
    return network


def images(rows=16):
    return 4 * torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def forced(decisions_BG):
    return lambda log_odds_B, gate_index: Choice(decisions_BG[:, gate_index])


@pytest.mark.parametrize(("name", "gates"), KINDS)
def test_in_evaluation_decisions_are_hard_and_repeatable_and_are_what_forward_does(name, gates):
    network = tiny(name, gates).eval()
    passed, again = network.pass_gates(images()), network.pass_gates(images())
    assert passed.decisions_BG.shape == passed.scores_BG.shape == (16, 4)
    assert torch.equal(passed.decisions_BG, (passed.scores_BG >= 0.5).float())
    assert 0 < passed.decisions_BG.mean() < 1
    assert torch.equal(passed.scores_BG, again.scores_BG)
    assert passed.log_probs_BG is None
    (logits,) = network(images())
    assert torch.equal(logits, passed.logits_EBC[0])


@pytest.mark.parametrize(("name", "gates"), KINDS)
def test_rows_that_disagree_get_the_same_answer_alone_as_together(name, gates):
    network = tiny(name, gates).eval()
    (together,) = network(images())
    for row in range(16):
        (alone,) = network(images()[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-5, rtol=1e-5)


def test_a_shut_gate_leaves_the_shortcut_alone_and_an_open_one_the_whole_block():
    network = tiny().eval()
    with torch.no_grad():
        shut = x = network.stem(images())
        for block in network.blocks:
            shut, x = block.shortcut(shut).relu(), block(x)
        for is_open, features in ((0.0, shut), (1.0, x)):
            passed = network.pass_gates(images(), forced(torch.full((16, 4), is_open)))
            torch.testing.assert_close(passed.logits_EBC[0], network.exits[0](features))


def test_with_all_gates_open_it_is_the_residual_network_without_gates():
    network = tiny(num_exits=2).eval()
    plain = create_network(
        "resnet", exits="pooled_linear", input_shape=(1, 8, 8), num_classes=5, knobs=TINY | {"num_exits": 2}
    ).eval()
    plain.stem.load_state_dict(network.stem.state_dict())
    for block, own in zip([block for stage in plain.stages for block in stage], network.blocks, strict=True):
        block.load_state_dict(own.state_dict())
    plain.exits.load_state_dict(network.exits.state_dict())
    passed = network.pass_gates(images(), forced(torch.ones(16, 4)))
    for ours, theirs in zip(passed.logits_EBC, plain(images()), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("name", "gates"), KINDS)
@pytest.mark.parametrize("relaxation", ["gumbel", "semantic_hashing", "straight_through"])
def test_a_relaxation_lets_the_gradient_of_the_answer_reach_every_gates_weights(name, gates, relaxation):
    network = create_network(name, 3, input_shape=(1, 8, 8), num_classes=5, knobs=TINY, gates=gates)
    torch.manual_seed(0)
    network.pass_gates(images(), RELAXATIONS[relaxation]).logits_EBC[-1].square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in network.gates.parameters())


@pytest.mark.parametrize(("name", "gates"), KINDS)
def test_drawn_decisions_keep_the_answers_gradient_from_the_gates_and_their_log_probability_brings_one(name, gates):
    network = tiny(name, gates)
    torch.manual_seed(0)
    passed = network.pass_gates(images(), Sampled())
    assert passed.log_probs_BG.shape == (16, 4)
    passed.logits_EBC[-1].square().sum().backward(retain_graph=True)
    assert all(weight.grad is None for weight in network.gates.parameters())
    passed.log_probs_BG.sum().backward()
    assert all(weight.grad is not None for weight in network.gates.parameters())


def test_costs_are_each_bodys_share_of_the_networks_flops():
    network = tiny(gates="feed_forward", num_exits=2)
    bodies = [8 * 8 * 9 * (4 * 4 + 4 * 4)] * 2 + [4 * 4 * 9 * (4 * 6 + 6 * 6), 4 * 4 * 9 * (6 * 6 + 6 * 6)]
    stem, shortcut, exits = 8 * 8 * 9 * 4, 4 * 4 * 4 * 6, 5 * (4 + 6)
    gates = (4 * 16 + 16) * 3 + (6 * 16 + 16)
    whole = sum(bodies) + stem + shortcut + exits + gates
    assert network.gate_costs_G == pytest.approx([body / whole for body in bodies])
    decisions = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]])
    expected = [1.0, (whole - sum(bodies)) / whole, (whole - bodies[0] - bodies[3]) / whole]
    torch.testing.assert_close(network.depth_B(decisions), torch.tensor(expected))


def test_a_network_is_built_ready_to_learn_with_its_statistics_untouched():
    network = create_network("skipnet", input_shape=(1, 8, 8), num_classes=5, knobs=TINY)
    assert all(module.training for module in network.modules())
    assert all(module.num_batches_tracked == 0 for module in network.modules() if isinstance(module, nn.BatchNorm2d))


def test_skipnet_is_resnet_38_unless_told_otherwise():
    for name in ("skipnet", "convnet_aig"):
        network = create_network(name)
        assert isinstance(network, GatedNetwork)
        assert len(network.gate_costs_G) == 18
        assert 0.98 < sum(network.gate_costs_G) < 1


@pytest.mark.parametrize(("name", "gates"), KINDS)
def test_a_traced_program_holds_a_mark_for_each_gate_in_order_and_answers_like_the_network(name, gates):
    network = tiny(name, gates, num_exits=2).eval()
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(network, (images(2),), dynamic_shapes=(batch,))
    marks = [node for node in program.graph.nodes if node.target is torch.ops.offramp.gate.default]
    assert [mark.args[2] for mark in marks] == [f"gate_{index}" for index in range(4)]
    assert {mark.args[0].target for mark in marks} == {torch.ops.aten.sigmoid.default}
    for ours, theirs in zip(program.module()(images(7)), network(images(7)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_exits_are_spread_over_the_blocks():
    network = tiny(num_exits=3)
    assert len(network(images())) == 3
    assert all(late > early for early, late in pairwise(network.exit_ends))
    assert network.exit_ends[-1] == 3
    with pytest.raises(ValueError, match="num_exits must be 1 to 4, the number of blocks; got 5"):
        tiny(num_exits=5)


def test_a_plan_remembers_its_gates_and_one_from_before_there_were_gates_is_read_as_ever():
    plan = plan_network("skipnet", gates="feed_forward")
    assert plan.to_json()["gates"] == "feed_forward"
    assert NetworkPlan.from_record(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan_network("skipnet").gates == "recurrent"
    for name in ("resnet", "convnet_aig"):
        record = plan_network(name).to_json()
        assert "gates" not in record
        assert NetworkPlan.from_record(record).gates is None


@pytest.mark.parametrize(
    ("name", "gates", "sentence"),
    [
        ("skipnet", "luck", "gates 'luck' is not one of feed_forward, recurrent"),
        ("resnet", "luck", "gates 'luck' is not one of feed_forward, recurrent"),
        ("resnet", "recurrent", "network 'resnet' leaves no choice of gates; these do: skipnet"),
    ],
)
def test_gates_that_cannot_be_chosen_are_refused(name, gates, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan_network(name, gates=gates)
    with pytest.raises(ValueError, match=sentence):
        NetworkPlan.from_record(plan_network(name).to_json() | {"gates": gates})


def test_hard_is_what_gates_do_unless_told_otherwise_in_training_too():
    network = tiny()
    torch.manual_seed(0)
    passed = network.pass_gates(images())
    assert torch.equal(passed.decisions_BG, network.pass_gates(images(), HARD).decisions_BG)
