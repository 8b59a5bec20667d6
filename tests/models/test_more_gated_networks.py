"""What holds for every gated network whose gates are central, dual or fixed, as it is served."""

import pytest
import torch
from offramp_models.gates import Choice
from offramp_models.networks import create_network
from offramp_models.training import Checkpoint, TrainingSettings, train
from torch import nn

RESIDUAL = {"widths": [4, 6], "blocks": 2}
KNOBS = {
    "blockdrop": RESIDUAL | {"policy_width": 2},
    "ddi": RESIDUAL,
    "layerdrop": {"depth": 4, "width": 8, "heads": 2, "grid": 4},
    "stochastic_depth": RESIDUAL,
}
METHODS = {"blockdrop": "curriculum_policy_gradient", "ddi": "resource"}
IS_FIXED = {"layerdrop", "stochastic_depth"}


def tiny(name, seed=3, num_classes=5):
    """A tiny network whose gates, where they look at the image, are open for some rows and shut for others."""
    network = create_network(name, seed, input_shape=(1, 8, 8), num_classes=num_classes, knobs=KNOBS[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for module in network.gates.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=3.0)
                nn.init.zeros_(module.bias)
    return network


def images(rows=16):
    return 4 * torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", sorted(KNOBS))
def test_in_evaluation_decisions_are_hard_and_repeatable_and_are_what_forward_does(name):
    network = tiny(name).eval()
    passed = network.pass_gates(images())
    assert torch.equal(passed.decisions_BG, (passed.scores_BG >= 0.5).float())
    assert passed.decisions_BG.shape == (16, 4)
    assert passed.decisions_BG.all() if name in IS_FIXED else 0 < passed.decisions_BG.mean() < 1
    for _ in range(2):
        assert torch.equal(network(images())[0], passed.logits_EBC[0])


@pytest.mark.parametrize("name", sorted(KNOBS))
def test_each_row_is_answered_as_its_own_decisions_say(name):
    network = tiny(name).eval()
    patterns_BG = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0]])
    together = network.pass_gates(images(4), lambda _, index: Choice(patterns_BG[:, index])).logits_EBC[0]
    assert len(together.unique(dim=0)) == 4
    for row in range(4):
        alone = network.pass_gates(
            images(4)[row : row + 1], lambda _, index, row=row: Choice(patterns_BG[row : row + 1, index])
        )
        torch.testing.assert_close(together[row : row + 1], alone.logits_EBC[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(KNOBS))
def test_a_traced_program_holds_a_mark_for_each_gate_in_order_and_answers_like_the_network(name):
    network = tiny(name).eval()
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(network, (images(2),), dynamic_shapes=(batch,), strict=False)
    marks = [node for node in program.graph.nodes if node.target is torch.ops.offramp.gate.default]
    assert [mark.args[2] for mark in marks] == [f"gate_{index}" for index in range(4)]
    for rows in (1, 5):
        torch.testing.assert_close(program.module()(images(rows)), network(images(rows)))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", sorted(KNOBS))
def test_a_training_goes_on_from_a_checkpoint_bit_for_bit(dots, tmp_path, name):
    settings = TrainingSettings(epochs=6, method=METHODS.get(name, "weighted"))
    whole, resumed = tiny(name, num_classes=4), tiny(name, seed=7, num_classes=4)
    train(whole, dots, settings)

    def interrupt(step):
        if step.index == 11:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(tiny(name, num_classes=4), dots, settings, interrupt, checkpoint=Checkpoint(tmp_path / "kept"))
    torch.manual_seed(5)
    train(resumed, dots, settings, checkpoint=Checkpoint(tmp_path / "kept", resume=True))
    expected, weights = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_fixed_scores_say_nothing_of_the_image():
    for name in IS_FIXED:
        scores = tiny(name).eval().pass_gates(images()).scores_BG
        assert torch.equal(scores, scores[:1].expand_as(scores))
