"""Networks that return early: whatever decides in their code, the bundle answers and leaves as they do.

Every network of `early_networks` is exported, opened, and asked 200 inputs that together take all its exits; the oracle
is the network itself, called with one row at a time.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from early_networks import (
    EARLY,
    Checked,
    ConfidentAndClear,
    InADataclass,
    MaxSoftmax,
    OnTheEdge,
    Patient,
    Trunk,
    VeryPatient,
)
from early_oracle import ask, images
from offramp_contract.errors import InvalidValue, TraceError
from offramp_contract.policy import Reason
from offramp_contract.policy_spec import NativeSpec
from offramp_exporter import export
from offramp_exporter.early_returns.courses import MAX_COURSES
from offramp_exporter.examples import Examples
from offramp_exporter.trace import trace
from offramp_runtime import open_bundle
from offramp_server import Engine
from offramp_server.messages import RowAnswer
from torch import Tensor, nn
from torch.nn import functional as F


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


Export = Callable[[type[nn.Module]], Path]


def leave(path: Path, x: Tensor, **policy: Any) -> list[tuple[int, str]]:
    """Give the exit and the reason of each row."""
    with Engine.open(path) as engine:
        rows = engine.classify(x.numpy(), **policy).rows
    return [(row.answer.exit_index, row.reason.label) for row in rows if isinstance(row, RowAnswer)]


def answers(path: Path, x: Tensor, **policy: Any) -> list[RowAnswer]:
    with Engine.open(path) as engine:
        rows = engine.classify(x.numpy(), **policy).rows
    return [row for row in rows if isinstance(row, RowAnswer)]


@pytest.mark.parametrize("kind", EARLY, ids=lambda kind: kind.__name__)
def test_a_network_that_returns_early_is_served_as_it_answers_itself(kind: type[Trunk], exported: Export) -> None:
    path, x = exported(kind), images()
    manifest = open_bundle(path).manifest
    own = ask(kind().eval(), x)

    rows = answers(path, x)

    assert manifest.default_policy == NativeSpec()
    exits = {asked.where: row.answer.exit_index for asked, row in zip(own, rows, strict=True)}
    assert len(set(exits.values())) == len(exits) == len(manifest.exits), "every exit is taken"
    for asked, row in zip(own, rows, strict=True):
        assert row.answer.exit_index == exits[asked.where]
        assert row.reason is (Reason.FINAL if row.answer.exit_index == len(exits) - 1 else Reason.NATIVE)
        np.testing.assert_allclose(row.answer.logits_C, asked.logits, rtol=1e-4, atol=1e-4)


def test_a_comparison_with_a_constant_becomes_a_rule_with_a_knob(exported: Export) -> None:
    manifest = open_bundle(exported(MaxSoftmax)).manifest

    rule = manifest.exits[0].native
    assert rule is not None
    assert (rule.threshold, rule.above, rule.is_strict, rule.precision, rule.is_knob) == (
        0.6,
        True,
        True,
        "float32",
        True,
    )
    assert len(rule.sources) == 1
    assert re.fullmatch(r"early_networks.py:\d+ \(if torch.max\(F.softmax.*\)", rule.sources[0])
    assert manifest.exits[-1].native is None


def test_a_threshold_moves_every_exit_that_has_a_knob(exported: Export) -> None:
    path, x = exported(MaxSoftmax), images()
    moved = MaxSoftmax().eval()
    moved.threshold = 0.75

    rows = answers(path, x, policy="native", threshold=0.75)

    assert [row.answer.exit_index for row in rows] == [asked.where for asked in ask(moved, x)]
    early = [row for row in rows if row.reason is Reason.NATIVE]
    assert early
    assert all(row.score > row.threshold == 0.75 for row in early)
    assert {exit_ for exit_, _ in leave(path, x, policy="native", threshold=1.0)} == {2}


def test_an_exit_may_keep_its_own_threshold_beside_another(exported: Export) -> None:
    path, x = exported(MaxSoftmax), images()

    own, given = answers(path, x), answers(path, x, policy={"kind": "native", "threshold": [1.0, None]})

    assert {row.answer.exit_index for row in given} == {1, 2}
    late = [i for i, row in enumerate(own) if row.answer.exit_index > 0]
    assert [given[i].answer.exit_index for i in late] == [own[i].answer.exit_index for i in late]


def test_a_rule_that_compares_nothing_with_a_constant_has_no_knob(exported: Export) -> None:
    path = exported(Patient)
    rules = [exit_.native for exit_ in open_bundle(path).manifest.exits[:-1]]

    assert all(rule is not None and not rule.is_knob and rule.threshold == 0.5 for rule in rules)
    with pytest.raises(InvalidValue, match="compare nothing with a constant"):
        answers(path, images()[:1], policy="native", threshold=0.7)
    with pytest.raises(InvalidValue, match=r"threshold.0: this exit's rule .* write null there"):
        answers(path, images()[:1], policy={"kind": "native", "threshold": [0.7, None]})


def test_other_policies_serve_the_same_bundle(exported: Export) -> None:
    path, x = exported(MaxSoftmax), images()

    by_confidence = answers(path, x, policy="confidence", threshold=0.6)

    assert [row.answer.exit_index for row in by_confidence] == [row.answer.exit_index for row in answers(path, x)]
    assert {reason for _, reason in leave(path, x, policy={"kind": "patience", "patience": 1})} <= {"patience", "final"}


ABOVE_AND_BELOW = [np.nextafter(np.float32(t), np.float32(to)) for t in (0.8, 0.2) for to in (0, 1)]


@pytest.mark.parametrize("column", range(7))
def test_a_score_exactly_at_the_constant_is_treated_as_the_network_treats_it(column: int, exported: Export) -> None:
    path, network = exported(OnTheEdge), OnTheEdge().eval()
    x = torch.full((7, 8), 0.5)
    edges = [*ABOVE_AND_BELOW, np.float32(0.8), np.float32(0.2), np.float32("nan")]
    x[:, column] = torch.tensor(np.array(edges))
    own = [asked.where for asked in ask(network, x)]

    rows = answers(path, x[:-1])

    assert own[:-1] == [row.answer.exit_index for row in rows]
    assert {column, 7} == set(own)


def test_what_was_asked_answered_and_where_stands_in_the_manifest(exported: Export) -> None:
    checked, _, sure = open_bundle(exported(Checked)).manifest.predicates

    assert checked.source.endswith("(if not torch.isfinite(x).all():)")
    assert checked.raises_on is False
    assert checked.comparison is None
    assert sure.comparison == "score > 0.7"
    assert sure.answers == {"exit_0": True, "exit_1": False}
    assert sure.raises_on is None


def test_the_second_half_of_an_and_is_a_question_of_its_own(exported: Export) -> None:
    manifest = open_bundle(exported(ConfidentAndClear)).manifest

    comparisons = [predicate.comparison for predicate in manifest.predicates]
    assert comparisons == ["score > 0.6", "score > 0.4"] * 2
    assert [predicate.answers["exit_2"] for predicate in manifest.predicates] == [None, False] * 2
    rule = manifest.exits[0].native
    assert rule is not None
    assert not rule.is_knob


def test_every_node_is_computed_once(exported: Export) -> None:
    bundle = open_bundle(exported(ConfidentAndClear))

    operators = Counter(node.op_type for graph in bundle.graphs for node in onnx.load_from_string(graph).graph.node)
    assert operators["Conv"] == 3
    assert operators["BatchNormalization"] == 0


def test_the_reference_says_which_exit_the_network_takes_and_what_it_asks() -> None:
    network, x = InADataclass().eval(), images()
    own = ask(network, x)

    returns = trace(network, x[:4]).returns

    assert returns is not None
    for asked, row in zip(own[:20], x[:20], strict=True):
        eager = returns.eager(Examples({"x": row[None].numpy()}))
        assert (eager.exit_index, eager.exit_name) == (asked.where, f"exit_{asked.where}")
        np.testing.assert_array_equal(eager.logits_BC[0], asked.logits)
        assert list(eager.predicates.values()) == [False] * asked.where + [True] * (asked.where < 2)


def test_an_input_on_which_the_network_raises_takes_no_exit() -> None:
    network = Checked().eval()
    returns = trace(network, images()[:1]).returns

    assert returns is not None
    eager = returns.eager(Examples({"x": np.full((1, 1, 6, 6), np.inf, np.float32)}))

    assert eager.exit_index is None
    assert returns.own(Examples({"x": np.full((1, 1, 6, 6), np.inf, np.float32)})) is None
    assert any("raises where the answer is no" in note for note in returns.notes())


def test_patience_in_python_is_refused_beyond_the_cap_with_the_policy_to_use() -> None:
    with pytest.raises(TraceError, match=rf"over {MAX_COURSES} courses, asking at early_networks.py:\d+") as caught:
        trace(VeryPatient().eval(), images()[:1])
    assert '{"kind": "patience", "patience": t}' in caught.value.message
    assert "class AllExits" in caught.value.message


class ValidityOnly(Trunk):
    def forward(self, x: Tensor) -> list[Tensor]:
        if torch.isnan(x).any():
            raise ValueError("not a number")
        first = self.block(0, x)
        return [self.head(0, first), self.head(1, self.block(1, first))]


def test_a_check_that_only_raises_leaves_a_network_that_returns_every_exit(tmp_path: Path) -> None:
    bundle = export(ValidityOnly().eval(), images()[:2], tmp_path / "checked")

    assert len(bundle.manifest.exits) == 2
    assert bundle.manifest.native is None


class Settings(Trunk):
    """Branches on settings and weights, which no input changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("is_deep", torch.tensor(True))
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.block(0, x)
        scale = self.temperature.item() if self.is_deep else 2.0
        if float(self.temperature) > 3:
            raise ValueError("too hot")
        return [self.head(0, x) / scale, self.head(1, self.block(1, x))]


def test_a_branch_on_a_setting_is_no_exit() -> None:
    traced = trace(Settings().eval(), images()[:2])

    assert traced.returns is None
    assert list(traced.paths) == ["exit_0", "exit_1"]


class Counts(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        x = self.block(0, x)
        if self.head(0, x).max() > 0.5 and self.seen > 0:
            return self.head(0, x) * self.seen
        return self.head(1, self.block(1, x)) + self.seen


class Samples(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        x = self.block(0, x)
        if self.head(0, x).max() > torch.rand(1):
            return self.head(0, x)
        return self.head(1, self.block(1, x)) + torch.rand(1)


class Hardens(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        x = self.block(0, x)
        if float(F.softmax(self.head(0, x), 1).max()) > 0.5:
            return self.head(0, x)
        return self.head(1, self.block(1, x))


class TakesTheLogarithm(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        x = self.block(0, x)
        if math.log(F.softmax(self.head(0, x), 1).max().item()) > -0.5:
            return self.head(0, x)
        return self.head(1, self.block(1, x))


class Lists(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        x = self.block(0, x)
        if max(F.softmax(self.head(0, x), 1).tolist()[0]) > 0.5:
            return self.head(0, x)
        return self.head(1, self.block(1, x))


class AsksNumpy(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        x = self.block(0, x)
        if np.max(F.softmax(self.head(0, x), 1).numpy()) > 0.5:
            return self.head(0, x)
        return self.head(1, self.block(1, x))


class TwoAtOnce(Trunk):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.block(0, x)
        if x.mean() > 1.4:
            x = self.block(1, x)
        return self.head(0, x), self.head(1, x)


class LoopsForever(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        out = self.head(0, self.block(0, x))
        while out.abs().max() > -1:
            out = out / 2
        return out


@pytest.mark.parametrize(
    ("kind", "sentence", "advice"),
    [
        (Counts, r"Counts.seen changes between calls at test_early_return.py:\d+", "input and weights alone"),
        (Samples, r"draws random numbers at inference at test_early_return.py:\d+", "argmax"),
        (Hardens, r"Python number of a tensor at test_early_return.py:\d+ \(if float", "conf > 0.8"),
        (TakesTheLogarithm, r"Python number of a tensor at test_early_return.py:\d+ \(if math.log", "torch.log"),
        (Lists, r"Python number of a tensor at test_early_return.py:\d+ \(if max", "torch.maximum"),
        (AsksNumpy, r"leaves torch for numpy at test_early_return.py:\d+ \(if np.max", "torch operations"),
        (TwoAtOnce, r"branches on a tensor's value at test_early_return.py:\d+ \(if x.mean", "return every exit"),
        (LoopsForever, r"loops until a tensor says so, at test_early_return.py:\d+", "bound the loop"),
    ],
)
def test_what_cannot_be_followed_ends_in_a_sentence(kind: type[Trunk], sentence: str, advice: str) -> None:
    with pytest.raises(TraceError, match=sentence) as caught:
        trace(kind().eval(), images()[:2])
    assert advice in caught.value.message


def test_the_user_may_say_where_the_answer_lies(tmp_path: Path) -> None:
    traced = trace(TwoAtOnce().eval(), images()[:2], exits=["out[1]"])

    assert traced.returns is not None
    assert set(traced.paths.values()) == {"out[1]"}
