"""The proof goes where the example does not: a wrong program is caught although the example is right.

Whatever is wrong here is wrong on a branch that neither the example nor random inputs like it take.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from early_networks import Checked, MaxSoftmax, Trunk
from hypothesis import given, settings
from hypothesis import strategies as st
from offramp_contract.errors import ExportError, ParityError
from offramp_exporter import export, pipeline
from offramp_exporter.coverage import NOT_ASKED, Behaviour, Effort, Goal, cover
from offramp_exporter.examples import Examples
from offramp_exporter.trace import Trace, trace
from offramp_exporter.verify import load, prove_covered
from offramp_runtime import Bundle, open_device
from torch import Tensor, nn
from torch.nn import functional as F

IMAGES = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


# A wrong program


class Rare(nn.Module):
    """Its last exit reads something else where the input is very bright, which no ordinary input is."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.body, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.heads = nn.ModuleList([nn.Linear(6, 4) for _ in range(2)])
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def carried(self, x: Tensor) -> Tensor:
        is_bright = x.amax(1, keepdim=True) > 8
        return torch.where(is_bright, self.other(x), self.body(x))

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.carried(x)
        return [self.heads[0](x), self.heads[1](hidden)]


class NeverRare(Rare):
    """The same without the branch: what a wrong trace of it would be."""

    def carried(self, x: Tensor) -> Tensor:
        return self.body(x)


def traced_wrongly(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Trace], Trace]) -> None:
    """Let the exporter make something else of the network than it is."""
    monkeypatch.setattr(pipeline, "trace", lambda *given: spoil(trace(*given)))


def test_a_value_that_is_wrong_on_one_branch_only_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    wrong = trace(NeverRare().eval(), x).program
    network = Rare().eval()
    for right, spoilt in zip(network(x), NeverRare().eval()(x), strict=True):
        torch.testing.assert_close(right, spoilt)
    traced_wrongly(monkeypatch, lambda traced: replace(traced, program=wrong))

    with pytest.raises(ParityError, match=r"exit 'exit_1', stage 'stage_1', tensor .* on varied inputs differs"):
        export(network, x, tmp_path / "wrong")

    assert not (tmp_path / "wrong").exists()


def with_rules(traced: Trace, **changed: Any) -> Trace:
    """Change the rule of the first exit."""
    returns = traced.returns
    assert returns is not None
    rules = {**returns.rules, "exit_0": returns.rules["exit_0"].model_copy(update=changed)}
    return replace(traced, returns=replace(returns, rules=rules))


@pytest.mark.parametrize("changed", [{"threshold": 0.603}, {"above": False}], ids=["threshold", "side"])
def test_a_wrong_rule_is_caught_although_the_example_leaves_where_it_should(
    changed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced_wrongly(monkeypatch, lambda traced: with_rules(traced, **changed))

    with pytest.raises(
        ParityError, match=r"under the native policy an input leaves at 'exit_\d', but the network itself returns at"
    ):
        export(MaxSoftmax().eval(), IMAGES[:1], tmp_path / "wrong")

    assert not (tmp_path / "wrong").exists()


class Doubled(MaxSoftmax):
    """Its last exit alone is another."""

    def head(self, index: int, x: Tensor) -> Tensor:
        return super().head(index, x) * (1.001 if index == 2 else 1)


def test_an_answer_that_is_wrong_at_an_exit_the_example_does_not_take_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bright = torch.full((1, 1, 6, 6), 4.0)
    assert MaxSoftmax().eval()(bright)[1] < 2
    wrong = trace(Doubled().eval(), bright).program
    traced_wrongly(monkeypatch, lambda traced: replace(traced, program=wrong))

    with pytest.raises(ParityError, match="exit 'exit_2'"):
        export(MaxSoftmax().eval(), bright, tmp_path / "wrong")


# Hard decisions inside


class Step(nn.Module):
    """Turns a row round where its first number is above a threshold."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.heads = nn.ModuleList([nn.Linear(6, 4) for _ in range(2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.heads[0](x), self.heads[1](torch.where(x[:, :1] > self.threshold, x, -x))]


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], int]:
    """Prove a step at 0 against one at a ten-millionth, on some rows between the two and as many as make 64."""
    torch.set_num_threads(1)
    network = Step(0.0).eval()
    bundle = export(network, torch.randn(4, 6), tmp_path_factory.mktemp("step") / "step")
    executor, other = load(bundle, open_device("cpu", threads=1)), Step(1e-7).eval()
    other.load_state_dict(network.state_dict())

    def prove(num_between: int) -> int:
        x = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
        x[:num_between, 0] = 5e-8
        return prove_covered(
            executor, lambda inputs: [out.detach().numpy() for out in inputs.call(other)], Examples({"x": x}), batch=8
        )

    return prove


def test_a_row_at_a_threshold_inside_the_network_is_counted_apart_from_errors(step: Callable[[int], int]) -> None:
    assert step(0) == 0
    assert step(3) == 3


def test_so_many_rows_at_a_threshold_are_an_error(step: Callable[[int], int]) -> None:
    with pytest.raises(ParityError, match="exit 'exit_1'"):
        step(32)


# What cannot be reached


class Keyed(Trunk):
    """Leaves early for images that are nearly a secret one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("key", torch.randn(1, 36, generator=torch.Generator().manual_seed(9)))

    def forward(self, x: Tensor) -> Tensor:
        x_flat, x = x.reshape(1, -1), self.block(0, x)
        if F.cosine_similarity(x_flat, self.key).max() > 0.999:
            return self.head(0, x)
        return self.head(1, self.block(1, x))


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.set_num_threads(1)
    return export(Keyed().eval(), IMAGES, tmp_path_factory.mktemp("keyed") / "keyed")


def test_what_no_input_reached_stands_in_the_manifest(keyed: Bundle) -> None:
    proof = keyed.manifest.provenance.proof

    assert proof is not None
    not_taken, never_yes = proof.unreached
    assert not_taken == f"exit_0 was not taken by any of {proof.num_inputs} inputs tried"
    assert never_yes.startswith("the question at test_coverage.py:")
    assert never_yes.endswith(f"was never answered yes by {proof.num_inputs} inputs tried")


def test_real_inputs_that_are_given_are_tried(tmp_path: Path) -> None:
    network = Keyed().eval()
    real = torch.cat([torch.randn(30, 1, 6, 6), network.key.reshape(1, 1, 6, 6)])

    bundle = export(network, IMAGES, tmp_path / "keyed", proof_inputs=real)

    proof = bundle.manifest.provenance.proof
    assert proof is not None
    assert proof.unreached == ()


def test_a_network_that_decides_nothing_has_nothing_unreached(tmp_path: Path) -> None:
    proof = export(Rare().eval(), torch.randn(2, 6), tmp_path / "rare").manifest.provenance.proof

    assert proof is not None
    assert proof.unreached == ()
    assert proof.num_inputs == 64


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.heads = nn.Embedding(5, 3), nn.ModuleList([nn.Linear(3, 4) for _ in range(2)])

    def forward(self, ids: Tensor, shift: Tensor) -> list[Tensor]:
        hidden = self.embed(ids).mean(1) + shift
        return [self.heads[0](hidden), self.heads[1](hidden.relu())]


TWO = {"ids": torch.ones(2, 4, dtype=torch.int64), "shift": torch.randn(2, 3)}


@pytest.mark.parametrize(
    ("proof_inputs", "sentence"),
    [
        ({"ids": TWO["ids"]}, "the network takes ids, shift; got ids"),
        ([TWO["ids"]], "the network takes ids, shift; in this order, or by name"),
        ({**TWO, "mask": TWO["ids"]}, "got ids, shift, mask"),
        ({**TWO, "shift": torch.zeros(2, 5)}, "shift: a row has the shape 3, not 5"),
        ({**TWO, "shift": torch.zeros(2)}, r"shift: a row has the shape 3, not \(\)"),
        ({**TWO, "shift": torch.tensor(1.0)}, "shift: give numbers, .* with the batch on axis 0"),
        ({**TWO, "shift": TWO["shift"].double()}, r"float32, not float64; save array.astype\('float32'\)"),
        ({**TWO, "shift": TWO["shift"].to(torch.bfloat16)}, "shift: give numbers, float32"),
        ({**TWO, "ids": TWO["ids"].int()}, "ids: the network takes int64, not int32"),
        ({**TWO, "shift": torch.tensor([[1.0, 2, 3], [1, np.nan, 3]])}, "row 1 holds NaN or infinity"),
        ({**TWO, "shift": torch.full((2, 3), -np.inf)}, "row 0 holds NaN or infinity"),
        ({**TWO, "shift": torch.zeros(5, 3)}, "as many rows as the others, not ids 2, shift 5"),
        ({"ids": TWO["ids"][:0], "shift": TWO["shift"][:0]}, "ids: there is no row"),
    ],
)
def test_inputs_that_are_no_good_are_refused_in_words(proof_inputs: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"proof inputs.*{sentence}"):
        export(TwoInputs().eval(), TWO, tmp_path / "two", proof_inputs=proof_inputs)

    assert not (tmp_path / "two").exists()


def test_an_input_on_which_the_network_raises_is_no_difference(tmp_path: Path) -> None:
    too_large = torch.full((1, 1, 6, 6), 1e7)
    network = Checked().eval()
    with pytest.raises(AssertionError):
        network(too_large)

    proof = export(network, IMAGES, tmp_path / "checked", proof_inputs=too_large).manifest.provenance.proof

    assert proof is not None
    assert not any("exit" in sentence.split()[0] for sentence in proof.unreached)


# The search


def ramp(thresholds: Sequence[float]) -> Goal:
    """Exits along the mean of the first input: each is asked for in turn."""

    def rules(inputs: Examples) -> Behaviour:
        mean_B = inputs.arrays["x"].mean(axis=1)
        above_BP = mean_B[:, None] > np.asarray(thresholds)
        exits_B = np.where(above_BP.any(axis=1), above_BP.argmax(axis=1), len(thresholds))
        order_P = np.arange(len(thresholds))
        answers_BP = np.where(order_P > exits_B[:, None], NOT_ASKED, above_BP)
        return Behaviour(exits_B.astype(np.int64), answers_BP.astype(np.int8))

    names = [f"exit_{index}" for index in range(len(thresholds) + 1)]
    return Goal(rules, names, [f"question {index}" for index in range(len(thresholds))])


def examples(values: npt.ArrayLike) -> Examples:
    return Examples({"x": np.asarray(values, dtype=np.float32)})


ORDINARY = examples(np.random.default_rng(0).normal(size=(4, 8)))


def test_the_search_finds_a_narrow_exit_between_two_others() -> None:
    coverage = cover(ORDINARY, ramp([0.5, 0.49]))

    assert coverage.unreached == ()
    assert coverage.exits_B is not None
    assert set(coverage.exits_B.tolist()) == {0, 1, 2}


def test_real_inputs_are_tried_as_they_are() -> None:
    real = examples(np.random.default_rng(1).normal(size=(30, 8)))

    tried = cover(ORDINARY, given=real).inputs.arrays["x"]

    assert all((tried == row).all(axis=1).any() for row in real.arrays["x"])


def test_the_search_goes_close_to_every_threshold() -> None:
    coverage = cover(ORDINARY, ramp([2.0, 1.0]))

    means = coverage.inputs.arrays["x"].mean(axis=1)
    assert all(np.abs(means - threshold).min() < 0.01 for threshold in (2.0, 1.0))


def test_what_the_search_cannot_find_is_named_once_each() -> None:
    coverage = cover(ORDINARY, ramp([1e30]))

    assert coverage.unreached == (
        "exit_0 was not taken by any of 400 inputs tried",
        "question 0 was never answered yes by 400 inputs tried",
    )


def test_the_search_ends_when_its_time_is_up() -> None:
    seconds = iter(range(1000))

    coverage = cover(ORDINARY, ramp([1e30]), effort=Effort(max_inputs=400, max_seconds=10), clock=lambda: next(seconds))

    assert 0 < coverage.num_tried < 400


def test_integers_stay_within_what_was_seen_of_them() -> None:
    tokens = Examples({"ids": np.array([[1, 7], [3, 2]]), "x": np.ones((2, 3), np.float32)})

    tried = cover(tokens).inputs.arrays

    assert tried["ids"].min() >= 1
    assert tried["ids"].max() <= 7
    assert len(np.unique(tried["x"])) > 10


@given(
    rows=st.integers(1, 60),
    num_given=st.integers(0, 300),
    max_inputs=st.integers(1, 120),
    threshold=st.floats(-5, 5),
)
@settings(deadline=None, max_examples=40)
def test_what_was_tried_is_what_is_told_and_never_too_much(
    rows: int, num_given: int, max_inputs: int, threshold: float
) -> None:
    generator = np.random.default_rng(rows)
    example = examples(generator.normal(size=(rows, 3)))
    given_ = examples(generator.normal(size=(num_given, 3))) if num_given else None
    goal = ramp([threshold])

    coverage = cover(example, goal, given=given_, effort=Effort(max_inputs, max_seconds=1e6))

    assert coverage.num_tried <= max_inputs
    assert coverage.exits_B is not None
    seen = goal.rules(coverage.inputs)
    np.testing.assert_array_equal(seen.exits_B, coverage.exits_B)
    for index, name in enumerate(goal.exits):
        was_told = f"{name} was not taken by any of {coverage.num_tried} inputs tried" in coverage.unreached
        assert was_told == (index not in coverage.exits_B)
    assert all(np.isfinite(array).all() for array in coverage.inputs.arrays.values())
