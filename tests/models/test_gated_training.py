"""How gates learn, and what is said of them while they do and afterwards."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from offramp_models import load_data
from offramp_models.gates import HARD, Choice, GatedPass, Sampled
from offramp_models.networks import MultiExitCNN, create_network
from offramp_models.training import (
    Checkpoint,
    GatedLesson,
    GateUse,
    Lesson,
    TrainingSettings,
    create_method,
    measure,
    methods,
    train,
)
from offramp_models.training.hybrid_policy_gradient import costs_to_come
from torch.nn import functional

LABELS = torch.tensor([0, 2, 1, 1])
COSTS = (0.2, 0.4, 0.1)


def tiny(name="skipnet", seed=0, gates=None, **knobs):
    chosen = {"widths": [4, 8], "blocks": 2} | knobs
    return create_network(name, seed, input_shape=(1, 8, 8), num_classes=4, knobs=chosen, gates=gates)


def lesson(passed, progress=0.5, served=None):
    """What a method sees of a pass; asked to rehearse, it gets what is served."""
    return Lesson(passed.logits_EBC, LABELS, progress, GatedLesson(passed, COSTS, lambda relax: served))


def a_pass(decisions, drawn=False, seed=0):
    random = torch.Generator().manual_seed(seed)
    logits = [torch.randn(4, 3, generator=random, requires_grad=True)]
    log_probs = torch.randn(4, 3, generator=random).requires_grad_() if drawn else None
    return GatedPass(logits, torch.rand(4, 3), decisions, log_probs)


def decisions(seed=0):
    return (torch.rand(4, 3, generator=torch.Generator().manual_seed(seed)) < 0.5).float()


def test_the_target_rate_method_adds_each_gates_squared_distance_from_its_target():
    opened = torch.tensor([[1.0, 0, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]], requires_grad=True)
    settings = TrainingSettings(method="target_rate", gate_target=0.25, gate_weight=3.0)
    passed = a_pass(opened)
    loss = create_method(settings)(lesson(passed))
    expected = functional.cross_entropy(passed.logits_EBC[0], LABELS) + 3.0 * (0.75**2 + 0 + 0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close(opened.grad, torch.tensor([[3 * 2 * 0.75 / 4, 0, 0]]).expand(4, 3))


def test_the_target_rate_method_ends_with_decisions_as_they_are_served():
    method = create_method(TrainingSettings(method="target_rate"))
    assert method.relaxation(0.1, 3) is None
    assert method.relaxation(0.9, 3) is HARD


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
def test_rates_move_towards_the_target_and_are_kept_by_the_decisions_that_serve(target):
    network = create_network(
        "convnet_aig", input_shape=(1, 8, 8), knobs={"widths": [4, 8], "blocks": 2}, num_classes=10
    )
    settings = TrainingSettings(epochs=6, batch_size=64, method="target_rate", gate_target=target, gate_weight=5.0)
    record = train(network, load_data("digits"), settings)
    assert record.test_gates.open_share == pytest.approx(target, abs=0.1)


def test_costs_to_come_are_those_of_the_gate_and_the_later_ones_that_open():
    opened = torch.tensor([[1.0, 1, 0], [0, 1, 1]])
    expected = torch.tensor([[0.6, 0.4, 0.0], [0.5, 0.5, 0.1]])
    torch.testing.assert_close(costs_to_come(opened, COSTS), expected)


def test_the_hybrid_method_relaxes_at_first_and_draws_later():
    method = create_method(TrainingSettings(method="hybrid_policy_gradient"))
    assert [method.relaxation(progress, 3) for progress in (0.0, 0.49)] == [None, None]
    assert [method.relaxation(progress, 3) for progress in (0.5, 0.99)] == [Sampled(), Sampled()]


def test_the_hybrid_methods_first_part_weighs_the_cost_more_and_more():
    passed = a_pass(decisions().requires_grad_())
    plain = functional.cross_entropy(passed.logits_EBC[0], LABELS)
    method = create_method(TrainingSettings(method="hybrid_policy_gradient", gate_weight=2.0))
    cost = (passed.decisions_BG @ torch.tensor(COSTS)).mean()
    for progress, share in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0)):
        torch.testing.assert_close(method(lesson(passed, progress)), plain + 2.0 * share * cost)


def test_the_hybrid_methods_gradient_praises_each_gate_for_what_came_after_it_less_what_serving_gets():
    passed, served = a_pass(decisions(1), drawn=True), a_pass(decisions(2), seed=5)
    method = create_method(TrainingSettings(method="hybrid_policy_gradient", gate_weight=2.0))
    loss = method(lesson(passed, 0.8, served))
    loss.backward()

    def rewards(of):
        losses = functional.cross_entropy(of.logits_EBC[0], LABELS, reduction="none").detach()
        spent = of.decisions_BG * torch.tensor(COSTS)
        return torch.stack([-losses - 2.0 * spent[:, gate:].sum(dim=1) for gate in range(3)], dim=1)

    torch.testing.assert_close(passed.log_probs_BG.grad, -(rewards(passed) - rewards(served)) / 4)
    logits = passed.logits_EBC[0].detach().requires_grad_()
    functional.cross_entropy(logits, LABELS).backward()
    torch.testing.assert_close(passed.logits_EBC[0].grad, logits.grad)  # rewards pass no gradient
    assert served.logits_EBC[0].grad is None
    spent = (passed.decisions_BG @ torch.tensor(COSTS)).mean()
    torch.testing.assert_close(loss, functional.cross_entropy(passed.logits_EBC[0], LABELS) + 2.0 * spent)


def test_dear_gates_shut_and_free_ones_stay_open(dots):
    depths = []
    for weight in (0.0, 10.0):
        settings = TrainingSettings(epochs=12, batch_size=32, method="hybrid_policy_gradient", gate_weight=weight)
        depths.append(train(tiny(gates="feed_forward"), dots, settings).test_gates.depth)
    assert depths[0] > 0.9
    assert depths[1] < 0.5


def test_rehearsing_is_serving_and_leaves_no_trace(dots, monkeypatch):
    network, seen = tiny(), []

    class Rehearsing(methods.Weighted):
        def __call__(self, lesson):
            before = {key: value.clone() for key, value in network.state_dict().items()}
            passed = lesson.gated.rehearse(HARD)
            after = network.state_dict()
            assert all(torch.equal(before[key], after[key]) for key in before)
            assert network.training
            assert not passed.logits_EBC[0].requires_grad
            shut = lesson.gated.rehearse(lambda log_odds, _: Choice(torch.zeros_like(log_odds)))
            assert not shut.decisions_BG.any()
            seen.append(torch.equal(passed.logits_EBC[0], lesson.logits_EBC[0]))
            return super().__call__(lesson)

    monkeypatch.setattr(methods, "METHODS", {"weighted": Rehearsing})
    train(network, dots, TrainingSettings(epochs=1))
    assert seen
    assert not any(seen)  # running statistics are not the batch's


@pytest.mark.parametrize("asked", ["", "semantic_hashing"])
def test_gates_decide_as_the_network_says_unless_the_training_says_otherwise(dots, asked, monkeypatch):
    seen = []

    class Watching(methods.Weighted):
        def __call__(self, lesson):
            seen.append(lesson.gated.passed.decisions_BG.detach())
            return super().__call__(lesson)

    monkeypatch.setattr(methods, "METHODS", {"weighted": Watching})
    train(tiny("convnet_aig"), dots, TrainingSettings(epochs=1, gate_relaxation=asked))
    is_between = [bool(((drawn > 0) & (drawn < 1)).any()) for drawn in seen]
    assert is_between == [asked == "semantic_hashing"] * len(seen)
    assert 0 < torch.cat(seen).mean() < 1


def test_every_epoch_says_how_gates_decided_in_it(dots, monkeypatch):
    seen, epochs = [], []

    class Watching(methods.Weighted):
        def __call__(self, lesson):
            seen.append(lesson.gated.passed.decisions_BG)
            return super().__call__(lesson)

    monkeypatch.setattr(methods, "METHODS", {"weighted": Watching})
    network = tiny("convnet_aig")
    train(network, dots, TrainingSettings(epochs=2), on_epoch=epochs.append)
    for index, epoch in enumerate(epochs):
        drawn = torch.cat(seen[3 * index : 3 * index + 3])
        assert epoch.gates.open_share_G == pytest.approx(drawn.mean(dim=0).tolist())
        assert epoch.gates.depth == pytest.approx(network.depth_B(drawn).mean().item())


def test_a_network_without_gates_has_no_use_of_gates_to_tell(dots):
    epochs = []
    network = MultiExitCNN(num_classes=4, widths=(4, 8), blocks=(1, 1), strides=(1, 2), upscale=1)
    record = train(network, dots, TrainingSettings(epochs=1), on_epoch=epochs.append)
    assert record.test_gates is None
    assert epochs[0].gates is None


def test_the_record_says_how_gates_decide_on_the_test_images(dots):
    network = tiny("convnet_aig")
    settings = TrainingSettings(epochs=12, batch_size=32, method="target_rate", gate_target=0.4, gate_weight=5.0)
    record = train(network, dots, settings)
    with torch.no_grad():
        passed = network.pass_gates(torch.from_numpy(dots.inputs(dots.test)))
    shares = passed.decisions_BG.mean(dim=0)
    assert 0 < shares.mean() < 1
    assert record.test_gates.open_share_G == pytest.approx(shares.tolist())
    assert record.test_gates.open_share == pytest.approx(shares.mean().item())
    costs = torch.tensor(network.gate_costs_G)
    assert record.test_gates.depth == pytest.approx((1 - sum(network.gate_costs_G)) + float(shares @ costs))
    hits = (passed.logits_EBC[0].argmax(1).numpy() == dots.test.labels_N).mean()
    assert record.test_accuracy_E == pytest.approx((hits,))
    assert measure(network, dots, dots.test).gates == record.test_gates
    written = json.loads(json.dumps(record.to_json()))
    assert written["test_gates"]["open_share_G"] == pytest.approx(shares.tolist())
    assert written["settings"]["gate_target"] == 0.4


def test_the_use_of_gates_counts_what_is_nearer_to_open():
    assert GateUse((0.5, 1.0), 0.7).open_share == 0.75


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (TrainingSettings(method="target_rate"), "training method 'target_rate' is for networks with gates; MultiExit"),
        (TrainingSettings(method="hybrid_policy_gradient"), "is for networks with gates; MultiExitCNN has none"),
        (TrainingSettings(gate_relaxation="gumbel"), "gate_relaxation is for networks with gates; MultiExitCNN has"),
    ],
)
def test_what_is_for_gates_is_refused_for_a_network_without(dots, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(MultiExitCNN(num_classes=4), dots, settings)


def test_a_relaxation_that_passes_no_gradient_is_refused_where_gates_learn_by_gradient():
    passed = a_pass(decisions(), drawn=True)
    with pytest.raises(ValueError, match="target_rate learns by the gradient of decisions; sampled ones pass none"):
        create_method(TrainingSettings(method="target_rate"))(lesson(passed))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gate_target": 1.01}, "gate_target must be a share from 0 to 1; got 1.01"),
        ({"gate_target": -0.1}, "gate_target must be a share from 0 to 1; got -0.1"),
        ({"gate_target": np.nan}, "gate_target must be a share from 0 to 1; got nan"),
        ({"gate_weight": -1.0}, "gate_weight must be from 0 to 1000; got -1.0"),
        ({"gate_weight": np.inf}, "gate_weight must be from 0 to 1000; got inf"),
    ],
)
def test_settings_of_gates_out_of_bounds_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainingSettings(**changes)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(("name", "method"), [("skipnet", "hybrid_policy_gradient"), ("convnet_aig", "target_rate")])
@pytest.mark.parametrize("step", [5, 11])
def test_a_gated_training_goes_on_from_a_checkpoint_bit_for_bit(dots, tmp_path, name, method, step):
    settings = TrainingSettings(epochs=4, batch_size=32, method=method)
    whole, resumed = tiny(name), tiny(name, seed=7)
    epochs, epochs_again = [], []
    train(whole, dots, settings, on_epoch=epochs.append)

    def interrupt(now):
        if now.index == step:
            raise Interrupted

    kept = Checkpoint(tmp_path / "training.ckpt", resume=True)
    with pytest.raises(Interrupted):
        train(tiny(name), dots, settings, interrupt, checkpoint=replace(kept, resume=False))
    torch.manual_seed(step)
    train(resumed, dots, settings, on_epoch=epochs_again.append, checkpoint=kept)
    expected, weights = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert [epoch.gates for epoch in epochs_again] == [epoch.gates for epoch in epochs[-len(epochs_again) :]]


def test_a_checkpoint_from_before_there_were_gates_goes_on(dots, tmp_path):
    path = tmp_path / "training.ckpt"
    network = MultiExitCNN(num_classes=4, widths=(4, 8), blocks=(1, 1), strides=(1, 2), upscale=1)
    train(network, dots, TrainingSettings(epochs=2), checkpoint=Checkpoint(path))
    content = torch.load(path, weights_only=True)
    content["training"] = {key: value for key, value in content["training"].items() if not key.startswith("gate_")}
    torch.save(content, path)
    assert train(network, dots, TrainingSettings(epochs=2), checkpoint=Checkpoint(path, resume=True))
    with pytest.raises(ValueError, match=r"gate_target is 0\.6 there and 0\.3 here"):
        train(network, dots, TrainingSettings(epochs=2, gate_target=0.3), checkpoint=Checkpoint(path, resume=True))


def test_computing_in_16_bits_hands_methods_32(dots, monkeypatch):
    seen = []

    class Watching(methods.Weighted):
        def __call__(self, lesson):
            passed = lesson.gated.passed
            seen.extend(each.dtype for each in (*passed.logits_EBC, passed.scores_BG, passed.decisions_BG))
            return super().__call__(lesson)

    monkeypatch.setattr(methods, "METHODS", {"weighted": Watching})
    train(tiny(), dots, TrainingSettings(epochs=1, bfloat16=True))
    assert set(seen) == {torch.float32}
