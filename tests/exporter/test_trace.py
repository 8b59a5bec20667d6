import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from offramp_contract.errors import TraceError
from offramp_exporter.trace import evaluating, trace
from offramp_exporter.values import Rows
from torch import Tensor, nn


class TwoExits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)
        self.unregistered = [nn.Dropout(0.5)]


class Plain(TwoExits):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.a(self.dropout(x)), self.b(self.unregistered[0](x))]


def test_every_reachable_module_is_traced_in_evaluation_mode() -> None:
    network = Plain().train()

    program = trace(network, torch.randn(1, 4)).program

    assert {node.op_type for node in program.nodes} == {"Gemm"}
    assert network.training
    assert network.unregistered[0].training


def test_modules_in_plain_containers_are_evaluated_and_restored() -> None:
    network = Plain().train()
    network.dropout.eval()

    with evaluating(network):
        assert not network.unregistered[0].training
    assert network.unregistered[0].training
    assert not network.dropout.training


def test_the_batch_is_dynamic_even_when_the_example_has_one_row() -> None:
    program = trace(Plain(), torch.randn(1, 4)).program

    assert program.shapes["x"] == (Rows(), 4)
    assert all(program.shapes[scores] == (Rows(), 3) for scores in program.exits.values())


TALKATIVE = """
import torch
from offramp_contract.errors import TraceError
from offramp_exporter.trace import trace

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x):
        print("inside forward")
        return [self.head(x)]

class Branches(Net):
    def forward(self, x):
        return [self.head(x)] if float(x.max()) > 0 else [self.head(-x)]

net = Net()
torch.nn.Module.__call__(net, torch.ones(2, 4))
trace(net, torch.ones(2, 4))
try:
    trace(Branches(), torch.ones(2, 4))
except TraceError:
    print("refused")
"""


def test_nothing_that_torch_prints_warns_or_logs_reaches_the_user() -> None:
    # In a process of its own: torch's log handlers hold the stream they were made with.
    run = subprocess.run([sys.executable, "-W", "error", "-c", TALKATIVE], capture_output=True, text=True, check=False)

    assert run.stderr == ""
    # forward's own words: our call, those that hear what it asks, how many rows it takes and what it returns, and the
    # two that must agree; not those of the tracing
    assert run.stdout.splitlines() == ["inside forward"] * 6 + ["refused"]


class BranchesOnTensor(TwoExits):
    def forward(self, x: Tensor) -> list[Tensor]:
        early = self.a(x)
        if early.softmax(1).max() > 0.99:
            return [early, self.b(x) * 2]
        return [early, self.b(x)]


class BranchesOnItem(TwoExits):
    def forward(self, x: Tensor) -> list[Tensor]:
        early = self.a(x)
        scale = 2.0 if early.max().item() > 0.5 else 1.0
        return [early, self.b(x) * scale]


class LeavesForNumpy(TwoExits):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.a(x), self.b(torch.from_numpy(np.sort(x.numpy(), axis=1)).float().contiguous().clone()[:, :4])]


class FixesTheBatch(TwoExits):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.a(x), self.b(x.reshape(3, 4))]


class RoundsTheBatch(TwoExits):
    def forward(self, x: Tensor) -> list[Tensor]:
        rows = int(x.shape[0] / 0.5) // 2
        return [self.a(x), self.b(x.view(rows, 4))]


class AsksForTheBatch(TwoExits):
    def forward(self, x: Tensor) -> list[Tensor]:
        if x.shape[0] > 2:
            return [self.a(x), self.b(x)]
        return [self.a(x), self.a(x)]


class UsesAnUntranslatedOperator(TwoExits):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.a(x), self.b(x.cummax(1)[0])]


class SqueezesAnAxisThatStays(TwoExits):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.a(x.squeeze(1)), self.b(x.unsqueeze(1).squeeze(1).squeeze(-1))]


class Raises(TwoExits):
    def forward(self, x: Tensor) -> list[Tensor]:
        raise KeyError("no such block")


@pytest.mark.parametrize(
    ("network", "sentence", "advice"),
    [
        (BranchesOnTensor(), r"branches on a tensor's value at test_trace.py:\d+ \(if early", "return every exit"),
        (BranchesOnItem(), r"branches on a tensor's value at test_trace.py:\d+ \(scale =", "return every exit"),
        (FixesTheBatch(), r"batch size became a constant.* at test_trace.py:\d+ \(return", "x.shape[0] or -1"),
        (RoundsTheBatch(), r"batch size became a constant.* at test_trace.py:\d+ \(", "without rounding"),
        (AsksForTheBatch(), r"its course depends on it at test_trace.py:\d+ \(if x.shape", "conditions"),
        (UsesAnUntranslatedOperator(), r"no translation for aten.cummax", "other operations"),
        (Raises(), r"fails on its example inputs at test_trace.py:\d+", "KeyError"),
    ],
)
def test_what_cannot_be_traced_names_the_line_and_what_to_do(network: nn.Module, sentence: str, advice: str) -> None:
    with pytest.raises(TraceError, match=sentence) as caught:
        trace(network, torch.randn(3, 4))
    assert advice in caught.value.message


def test_a_squeeze_of_an_axis_that_is_not_one_does_nothing_as_in_torch() -> None:
    operators = {node.op_type for node in trace(SqueezesAnAxisThatStays(), torch.randn(3, 4)).program.nodes}

    assert operators <= {"Gemm", "Identity", "Squeeze", "Unsqueeze"}


def test_numpy_inside_forward_is_traced_where_torch_can_and_else_refused() -> None:
    with pytest.raises(TraceError, match=r"leaves torch for numpy at test_trace.py:\d+.*write that part with torch"):
        trace(LeavesForNumpy(), torch.randn(3, 4))


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ((torch.randn(2, 4), torch.randn(2, 4)), "does not take 2 example inputs"),
        ({"x": torch.randn(2, 4), "y": torch.randn(3, 4)}, "same number of rows"),
        (torch.tensor(1.0), "batch on axis 0"),
        (torch.zeros(0, 4), "at least one row"),
        (torch.zeros(2, 4, dtype=torch.bfloat16), "a bundle takes float32"),
    ],
)
def test_example_inputs_that_fit_no_network_are_refused(inputs: Any, sentence: str) -> None:
    with pytest.raises(TraceError, match=sentence):
        trace(Plain(), inputs)
