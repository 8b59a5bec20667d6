"""What cannot be served in stages is refused in one sentence, with the line and what to do; nothing is written."""

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from offramp_contract.errors import ExportError
from offramp_contract.policy_spec import AnyOfSpec, ConfidenceSpec, PatienceSpec
from offramp_exporter import export
from torch import Tensor, nn
from torch.nn import functional as F


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(6, 6)
        self.heads = nn.ModuleList([nn.Linear(6, 4) for _ in range(2)])

    def exits(self, x: Tensor) -> list[Tensor]:
        return [self.heads[0](x), self.heads[1](self.block(x).relu())]


class DropoutLeftOn(Heads):
    def forward(self, x: Tensor) -> list[Tensor]:
        return self.exits(F.dropout(x, 0.5))


class Noise(Heads):
    def forward(self, x: Tensor) -> list[Tensor]:
        return self.exits(x + torch.rand(6))


class Samples(Heads):
    def forward(self, x: Tensor) -> list[Tensor]:
        early, late = self.exits(x)
        return [early, late * torch.bernoulli(early.sigmoid())]


class GumbelGate(Heads):
    def forward(self, x: Tensor) -> list[Tensor]:
        early, late = self.exits(x)
        gate = F.gumbel_softmax(early, hard=True)
        return [early, late * gate]


class PythonsDice(Heads):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [exit_ * random.random() for exit_ in self.exits(x)]


class CountsCalls(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> list[Tensor]:
        self.calls += 1
        return [exit_ * self.calls for exit_ in self.exits(x)]


class ListThatGrows(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Tensor] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        for exit_ in self.exits(x):
            self.answers.append(exit_)
        return self.answers


class RunningMean(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> list[Tensor]:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.exits(x - self.mean)


class CentresTheBatch(Heads):
    def forward(self, x: Tensor) -> list[Tensor]:
        centred = x - x.mean(0)
        return self.exits(centred)


class DecidesForTheBatch(Heads):
    def forward(self, x: Tensor) -> list[Tensor]:
        early, late = self.exits(x)
        everyone = (early.max(1)[0] > 0).all()
        return [early, torch.where(everyone, early, late)]


class BatchNormWithoutStatistics(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, track_running_stats=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.exits(self.norm(x))


class MixesNeighbours(Heads):
    def forward(self, x: Tensor) -> list[Tensor]:
        return self.exits(x + x.flip(0))


class SortsInNumpy(Heads):
    def forward(self, x: Tensor) -> list[Tensor]:
        order = torch.as_tensor(np.sort(x.detach().cpu().numpy(), axis=1))
        return self.exits(order)


class HalfTheBatch(Heads):
    def forward(self, x: Tensor) -> list[Tensor]:
        half = int(x.shape[0] / 2)
        return self.exits(torch.cat([x[:half], x[half:]]).view(half * 2, 6))


class RowByRow(Heads):
    def forward(self, x: Tensor) -> list[Tensor]:
        rows = [self.block(row) for row in x]
        return self.exits(torch.stack(rows))


class PicksByMask(Heads):
    def forward(self, x: Tensor) -> list[Tensor]:
        early, late = self.exits(x)
        chosen = x[x > 0].sum()
        return [early, late + chosen]


class Bags(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 6)

    def forward(self, x: Tensor) -> list[Tensor]:
        ids = x.abs().long().clamp(max=8)
        return self.exits(self.bag(ids))


class Inverts(Heads):
    def forward(self, x: Tensor) -> list[Tensor]:
        square = torch.eye(6) + x[:, :, None] * x[:, None]
        return self.exits(torch.linalg.inv(square).mean(1))


class Scripted(Heads):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that TorchScript is deprecated
            self.script = torch.jit.trace(nn.Linear(6, 6), torch.randn(2, 6))

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.exits(self.script(x))


class SameTwice(Heads):
    def forward(self, x: Tensor) -> list[Tensor]:
        early, late = self.exits(x)
        return [early, early, late]


class NoExits(Heads):
    def forward(self, x: Tensor) -> Tensor:
        return self.exits(x)[1].argmax(1)


class TakesADict(Heads):
    def forward(self, batch: dict[str, Tensor]) -> list[Tensor]:
        return self.exits(batch["x"])


RANDOM = (
    r"draws random numbers at inference at test_impossible.py:\d+ \({line}.*in eval\(\) leave dropout and noise out"
)
STATE = r"answers differently when it is called twice with the same input: {what} changes between calls"
MIXES = r"a row depends on the rows beside it, at test_impossible.py:\d+ \({line}.*must become per row"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (DropoutLeftOn, RANDOM.format(line=r"return self.exits\(F.dropout")),
        (Noise, RANDOM.format(line="return self.exits")),
        (Samples, RANDOM.format(line="return .early, late")),
        (GumbelGate, RANDOM.format(line="gate = ")),
        (PythonsDice, "answers differently.*although nothing that it holds has changed; let forward compute"),
        (CountsCalls, STATE.format(what="CountsCalls.calls") + r" at test_impossible.py:\d+ \(self.calls \+= 1\)"),
        (ListThatGrows, STATE.format(what="ListThatGrows.answers") + r" at .*:\d+ \(self.answers.append"),
        (RunningMean, STATE.format(what="RunningMean.mean") + r" at .*:\d+ \(self.mean = 0.9"),
        (CentresTheBatch, MIXES.format(line="centred = ")),
        (DecidesForTheBatch, MIXES.format(line="everyone = ")),
        (BatchNormWithoutStatistics, MIXES.format(line=r"return self.exits\(self.norm")),
        (MixesNeighbours, "a row depends on the rows beside it at exit 'exit_0'; statistics over the batch"),
        (SortsInNumpy, r"leaves torch for numpy at .*:\d+ \(order = .*write that part with torch"),
        (HalfTheBatch, r"batch size became a constant, or its course depends on it at .*:\d+ \(.*without rounding"),
        (RowByRow, r"batch size became a constant, or its course depends on it at .*:\d+ \(rows = .*loops over rows"),
        (PicksByMask, r"at .*:\d+ \(chosen = .*picks elements by their value.*torch.where\(mask, a, b\)"),
        (Bags, r"at .*:\d+ \(return self.exits\(self.bag.*branches or loops inside the graph"),
        (Inverts, r"no translation for aten.linalg_inv_ex.*with other operations"),
        (Scripted, r"module 'script' is TorchScript.*make it from its Python class"),
        (SameTwice, r"exit 'exit_\d' .* needs nothing that the exits before it do not compute; name each exit once"),
        (NoExits, r"forward returns no float tensor of shape \(batch, classes >= 2\)[\s\S]*def forward"),
        (TakesADict, r"the network fails on its example inputs at .*:\d+ \(return self.exits\(batch"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_sentence(
    make: Callable[[], nn.Module], sentence: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)

    with pytest.raises(ExportError, match=sentence):
        export(make(), torch.randn(2, 6), tmp_path / "out")

    assert not list(tmp_path.iterdir())


class Tracks(Heads):
    """Notes down what it has seen, which changes no answer."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[Tensor] = []
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        self.last = self.exits(x)[0]
        self.history.append(self.last)
        return [self.last, self.exits(x)[1]]


def test_export_leaves_no_traced_tensors_behind_in_the_network(tmp_path: Path) -> None:
    network = Tracks()

    export(network, torch.randn(2, 6), tmp_path / "out")

    kept = [network.last, *network.history]
    assert kept
    assert all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in kept)
    assert torch.stack([tensor[:1] for tensor in kept if tensor is not None]).isfinite().all()


def test_a_hard_decision_is_named_in_the_report(tmp_path: Path) -> None:
    class Threshold(Heads):
        def forward(self, x: Tensor) -> list[Tensor]:
            early, late = self.exits(x)
            return [early, late * (early > 0.25).float()]

    said: list[str] = []

    export(Threshold(), torch.randn(2, 6), tmp_path / "out", progress=said.append)

    note = next(sentence for sentence in said if sentence.startswith("decides hard at test_impossible.py:"))
    assert "(return [early, late * (early > 0.25).float()])" in note


def test_neither_labels_nor_a_policy_that_compares_them_fit_exits_of_different_width(tmp_path: Path) -> None:
    network = Heads()
    network.heads[0] = nn.Linear(6, 2)
    network.forward = network.exits  # type: ignore[method-assign]

    with pytest.raises(ExportError, match="4 labels do not fit the exits' number of classes"):
        export(network, torch.randn(2, 6), tmp_path / "out", exits=["out[0]", "out[1]"], labels=list("abcd"))
    with pytest.raises(ExportError, match="patience and agreement compare labels, and the exits have different"):
        export(
            network,
            torch.randn(2, 6),
            tmp_path / "out",
            exits=["out[0]", "out[1]"],
            default_policy=AnyOfSpec(of=(PatienceSpec(patience=1), ConfidenceSpec())),
        )
