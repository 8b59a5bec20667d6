"""Networks that torch.onnx need not rewrite before it translates them, and those that only look like it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from offramp_exporter import export
from offramp_runtime import StageExecutor, open_device, run_all_exits
from torch import Tensor, nn
from torch.export import ExportedProgram


class Network(nn.Module):
    """A convolution and two exits; what lies between them is `between`."""

    def __init__(self, **norm: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, **norm)
        self.pool = nn.MaxPool2d(2)
        self.early, self.late = nn.Linear(4, 3), nn.Linear(4, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, image: Tensor) -> list[Tensor]:
        x = torch.relu(self.conv(image))
        y = self.between(x)
        return [self.early(x.mean((2, 3))), self.late(self.pool(y).mean((2, 3)))]


class Plain(Network):
    def between(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x) + x)


class InPlace(Network):
    def between(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y += x
        return torch.relu_(y)


class ReadsWhatItWroteOver(Network):
    def between(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.relu_(y) + y


class ReadsAViewFromBefore(Network):
    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(4 * 36, 3)

    def forward(self, image: Tensor) -> list[Tensor]:
        x = torch.relu(self.conv(image))
        y = self.norm(x)
        flat = y.flatten(1)
        torch.relu_(y)
        return [self.early(x.mean((2, 3))), self.late(flat)]


class WritesThroughAView(Network):
    def between(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        torch.relu_(y.flatten(1))
        return y


@pytest.fixture
def rewritten(monkeypatch: pytest.MonkeyPatch) -> list[ExportedProgram]:
    """The programs that were rewritten."""
    programs: list[ExportedProgram] = []
    run = ExportedProgram.run_decompositions

    def noted(program: ExportedProgram, table: Any = None) -> ExportedProgram:
        programs.append(program)
        return run(program, table)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", noted)
    return programs


@pytest.mark.parametrize(
    ("network", "is_spared"),
    [
        (Plain(), True),
        (InPlace(), True),
        (ReadsWhatItWroteOver(), True),
        (ReadsAViewFromBefore(), False),
        (WritesThroughAView(), False),
        (Plain(affine=False), False),
        (Plain(track_running_stats=False), False),
    ],
    ids=[
        "plain",
        "in place",
        "reads what it wrote over",
        "a view from before",
        "writes through a view",
        "no weights",
        "no statistics",
    ],
)
def test_a_network_is_rewritten_only_where_it_must_be_and_its_bundle_is_it_either_way(
    tmp_path: Path, rewritten: list[ExportedProgram], network: Network, is_spared: bool
) -> None:
    if not network.norm.track_running_stats:  # its statistics are those of the batch, so a row would not be itself
        with pytest.raises(Exception, match="row"):
            export(network.eval(), torch.randn(2, 1, 6, 6), tmp_path / "bundle")
        assert rewritten
        return
    bundle = export(network.eval(), torch.randn(2, 1, 6, 6), tmp_path / "bundle")
    assert bool(rewritten) is not is_spared
    image = torch.randn(5, 1, 6, 6)
    answers = run_all_exits(StageExecutor(bundle, open_device("cpu", 1)), {"image": image.numpy()})
    for (logits_BC, _), expected_BC in zip(answers, network(image), strict=True):
        np.testing.assert_allclose(logits_BC, expected_BC.detach().numpy(), rtol=1e-4, atol=1e-4)
