"""The gate operator: eager, in a gradient, and in a traced program."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from offramp_models.gates import gate
from offramp_models.gates.operator import _gate
from torch import nn


class Gated(nn.Module):
    """Two gated blocks, written plainly."""

    def __init__(self):
        super().__init__()
        self.score, self.body = nn.Linear(3, 1), nn.Linear(3, 3)

    def forward(self, x):
        x = x + gate(torch.sigmoid(self.score(x)), 0.4, "first") * self.body(x)
        return x + gate(torch.sigmoid(self.score(x)[:, 0]))[:, None] * self.body(x)


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(1, 6), elements=st.floats(0, 1, width=32)),
    st.floats(0, 1),
    st.sampled_from([(), (1,), (1, 1), (1, 1, 1)]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_gate_is_open_from_its_threshold_on_and_shut_below(scores, threshold, ones, dtype):
    score = torch.from_numpy(scores).reshape(-1, *ones).to(dtype)
    decision = gate(score, threshold)
    assert (decision.shape, decision.dtype) == (score.shape, dtype)
    assert torch.equal(decision == 1, score >= threshold)
    assert torch.equal(decision == 0, score < threshold)


def test_a_score_that_is_no_number_shuts_the_gate():
    assert gate(torch.tensor([torch.nan, 1.0])).tolist() == [0.0, 1.0]


def test_the_gradient_of_the_decision_is_handed_to_the_score_unchanged():
    score = torch.rand(5, 1, requires_grad=True)
    weights = torch.randn(5, 1)
    (gate(score) * weights).sum().backward()
    assert torch.equal(score.grad, weights)


@pytest.mark.parametrize(
    ("score", "threshold", "sentence"),
    [
        (torch.tensor(0.5), 0.5, r"one number per row, shape \(B,\) or \(B, 1, ..\); got \(\)"),
        (torch.rand(3, 2), 0.5, r"one number per row.*got \(3, 2\)"),
        (torch.rand(3, 1, 2, 2), 0.5, r"one number per row.*got \(3, 1, 2, 2\)"),
        (torch.ones(3, dtype=torch.long), 0.5, "must be of a float type; got torch.int64"),
        (torch.rand(3), 1.5, "threshold must be from 0 to 1; got 1.5"),
        (torch.rand(3), float("nan"), "threshold must be from 0 to 1; got nan"),
    ],
)
def test_what_is_no_score_of_rows_or_no_threshold_is_refused(score, threshold, sentence):
    with pytest.raises(ValueError, match=sentence):
        gate(score, threshold)


def test_the_operator_is_sound_in_torchs_own_eyes():
    for score in (torch.rand(4), torch.rand(4, 1, 1, 1, requires_grad=True)):
        torch.library.opcheck(_gate, (score, 0.5, "name"))


def test_a_traced_program_holds_each_gate_with_its_score_in_front_and_decides_like_the_module():
    module = Gated().eval()
    program = torch.export.export(module, (torch.randn(2, 3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    marks = [node for node in program.graph.nodes if node.target is torch.ops.offramp.gate.default]
    assert [node.args[1:] for node in marks] == [(0.4, "first"), (0.5, "")]
    scores = [node.args[0] for node in marks]
    assert [(score.target, tuple(score.meta["val"].shape[1:])) for score in scores] == [
        (torch.ops.aten.sigmoid.default, (1,)),
        (torch.ops.aten.sigmoid.default, ()),
    ]
    for rows in (1, 2, 7):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(program.module()(x), module(x))
