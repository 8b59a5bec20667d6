"""Operations that exporters stumble over: each is exported, proved and run, or is in `habits/test_impossible.py`.

They are put together in a few networks, as one export takes a second.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offramp_exporter import export
from offramp_exporter.decompositions import DECOMPOSITIONS, decomposed
from offramp_runtime import StageExecutor, open_device, run_all_exits
from torch import Tensor, nn
from torch.nn import functional as F

Operation = Callable[[Tensor], Tensor]
MAPS, ROW, TOKENS = (4, 7, 9), (8,), (5, 8)


def _grid(x: Tensor) -> Tensor:
    return F.affine_grid(0.9 * torch.eye(2, 3).expand(x.size(0), -1, -1), list(x.shape), align_corners=False)


def _masked(x: Tensor) -> Tensor:
    y = x.clone()
    y[y < 0] = 0.5
    return y


def _masked_rows(x: Tensor) -> Tensor:
    y = x.view(-1, 4, 2).clone()
    y[x.view(-1, 4, 2).sum(2) < 0] = -1.0
    return y


def _assigned(x: Tensor) -> Tensor:
    y = torch.zeros(x.size(0), 3, 8)
    y[:, 0] = x
    y[:, 1, ::2] = x[:, ::2]
    y[:, 2, 2:5] += x[:, :3]
    return y


POOLS: dict[str, Operation] = {
    "adaptive max that does not divide": lambda x: F.adaptive_max_pool2d(x, (3, 2)),
    "adaptive max that divides": lambda x: F.adaptive_max_pool2d(x, (7, 3)),
    "adaptive max to one": lambda x: F.adaptive_max_pool2d(x, 1),
    "adaptive max of one axis": lambda x: F.adaptive_max_pool1d(x.flatten(2), 5),
    "adaptive max of three axes": lambda x: F.adaptive_max_pool3d(x[:, None], (3, 2, 4)),
    "adaptive mean that does not divide": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "adaptive mean upwards": lambda x: F.adaptive_avg_pool2d(x, (11, 5)),
    "adaptive mean of one axis": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 5),
    "adaptive mean of three axes": lambda x: F.adaptive_avg_pool3d(x[:, None], (3, 2, 4)),
    "max with a ceiling": lambda x: F.max_pool2d(x, 3, 2, padding=1, ceil_mode=True),
    "mean with a ceiling": lambda x: F.avg_pool2d(x, 3, 2, padding=1, ceil_mode=True, count_include_pad=False),
    "power": lambda x: F.lp_pool2d(x, 2, 2),
}
MAPS_OPERATIONS: dict[str, Operation] = {
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest to a size": lambda x: F.interpolate(x, size=(5, 6)),
    "nearest exact": lambda x: F.interpolate(x, size=(5, 6), mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(x, size=(5, 13), mode="bilinear"),
    "bilinear with corners": lambda x: F.interpolate(x, size=(5, 13), mode="bilinear", align_corners=True),
    "bilinear by half": lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear"),
    "bicubic": lambda x: F.interpolate(x, size=(10, 4), mode="bicubic"),
    "area": lambda x: F.interpolate(x, size=(3, 4), mode="area"),
    "einsum": lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
    "roll": lambda x: torch.roll(x, (2, -1), (2, 3)),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x[:, :, :6, :8], 2),
    "channel shuffle": lambda x: F.channel_shuffle(x, 2),
    "grid sample": lambda x: F.grid_sample(x, _grid(x), align_corners=False),
    "view after transpose": lambda x: x.transpose(1, 2).contiguous().view(x.size(0), -1, 9),
    "reshape after permute": lambda x: x.permute(0, 2, 3, 1).reshape(x.size(0), -1),
    "chunks": lambda x: torch.cat(x.chunk(3, 3)[::-1], 3),
    "unfold": lambda x: F.unfold(x, 3, padding=1),
    "windows": lambda x: x.unfold(2, 3, 2),
    "an idle squeeze": lambda x: x.squeeze(1).squeeze(-1),
    "reflected edges": lambda x: F.pad(x, (1, 2, 1, 1), mode="reflect"),
    "repeated edges": lambda x: F.pad(x, (1, 2, 1, 1), mode="replicate"),
}
ROW_OPERATIONS: dict[str, Operation] = {
    "unflatten": lambda x: x.unflatten(1, (2, 4)).transpose(1, 2),
    "argmax": lambda x: F.one_hot(x.argmax(1), 8).float() * x,
    "topk": lambda x: x.topk(3, 1)[0],
    "sort": lambda x: x.sort(1, descending=True)[0],
    "k-th value": lambda x: x.kthvalue(2, 1)[0][:, None] * x,
    "k-th value with its axis": lambda x: x.kthvalue(2, 1, keepdim=True)[0] * x,
    "median": lambda x: x.median(1)[0][:, None] * x,
    "gather": lambda x: x.gather(1, x.topk(2, 1)[1]),
    "scatter a number": lambda x: torch.zeros_like(x).scatter(1, x.topk(2, 1)[1], 1.0) * x,
    "scatter more than the index": lambda x: torch.zeros_like(x).scatter(1, x.topk(2, 1)[1], x),
    "add more than the index": lambda x: torch.zeros_like(x).scatter_add(1, x.topk(2, 1)[1], x),
    "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "a number where a mask is": _masked,
    "a number where a mask of rows is": _masked_rows,
    "slices assigned": _assigned,
    "in place": lambda x: (x * 1).add_(1).mul_(2).relu_(),
    "a list as index": lambda x: x[:, [0, 3, 3, 7]],
    "cumulated": lambda x: x.cumsum(1) + x.cumprod(1),
    "distances": lambda x: torch.cdist(x.view(-1, 4, 2), x.view(-1, 4, 2) + 1),
    "city distances": lambda x: torch.cdist(x.view(-1, 4, 2), x.view(-1, 4, 2) + 1, p=1),
    "similarity": lambda x: F.cosine_similarity(x[:, :, None], x[:, None], dim=1),
    "buckets": lambda x: torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])).float() + x,
    "a sorted search": lambda x: torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0]), x).float() + x,
    "a sorted search from the right": lambda x: torch.searchsorted(torch.tensor([-1.0, 1.0]), x, right=True) + x,
    "embedding": lambda x: F.embedding(x.abs().long().clamp(max=8), torch.arange(18.0).view(9, 2), padding_idx=0),
    "norms": lambda x: F.normalize(x) + x.std(1, keepdim=True) + x.norm(dim=1, keepdim=True),
    "any and all": lambda x: x * (x > 0).any(1, keepdim=True) + (x > -2).all(1, keepdim=True).float(),
    "repeats": lambda x: x.repeat(1, 2) + x.repeat_interleave(2, 1) + x.tile(1, 2),
    "a new tensor": lambda x: torch.cat([x, x.new_zeros(x.size(0), 2)], 1),
}


class Modules(nn.Module):
    """Layers with ways of their own in eval()."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm, self.group_norm = nn.LayerNorm(8), nn.GroupNorm(5, 5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.forwards = nn.GRU(8, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        attended, weights = self.attention(x, x, x)
        fast = self.attention(x, x, x, need_weights=False)[0]
        _, last = self.forwards(x)
        parts = [self.layer_norm(x), self.group_norm(x), attended, weights, fast, self.encoder(x), last[0]]
        return torch.cat([part.flatten(1) for part in parts], 1)


class Uses(nn.Module):
    """Two exits that read the results of many operations."""

    def __init__(self, operations: Sequence[nn.Module | Operation], row: tuple[int, ...]) -> None:
        super().__init__()
        self.operations = list(operations)
        for index, operation in enumerate(self.operations):
            if isinstance(operation, nn.Module):
                self.add_module(str(index), operation.eval())
        width = self.results(torch.randn(2, *row)).shape[1]
        self.early, self.late = nn.Linear(width, 3), nn.Linear(width, 3)

    def results(self, x: Tensor) -> Tensor:
        return torch.cat([operation(x).flatten(1) for operation in self.operations], 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        results = self.results(x)
        return [self.early(results), self.late(results.sin())]


@pytest.mark.parametrize(
    ("operations", "row"),
    [
        (list(POOLS.values()), MAPS),
        (list(MAPS_OPERATIONS.values()), MAPS),
        (list(ROW_OPERATIONS.values()), ROW),
        ([Modules()], TOKENS),
    ],
    ids=["pools", "maps", "rows", "modules"],
)
def test_a_network_that_uses_an_operation_is_exported(
    operations: Sequence[nn.Module | Operation], row: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = Uses(operations, row).eval()

    bundle = export(network, torch.randn(2, *row), tmp_path / "out")

    x = torch.randn(20, *row)
    answers = run_all_exits(StageExecutor(bundle, open_device("cpu", threads=1)), {"x": x.numpy()})
    for (logits_BC, _), expected_BC in zip(answers, network(x), strict=True):
        np.testing.assert_allclose(logits_BC, expected_BC.detach().numpy(), rtol=1e-3, atol=1e-3)


SIZES = st.tuples(*[st.integers(1, 9)] * 2)


@given(size=SIZES, output=SIZES)
def test_adaptive_pools_are_decomposed_exactly(size: tuple[int, int], output: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)

    maximum, _ = DECOMPOSITIONS[torch.ops.aten.adaptive_max_pool2d.default](x, output)
    mean = DECOMPOSITIONS[torch.ops.aten.adaptive_avg_pool3d.default](x, (2, *output))

    assert torch.equal(maximum, F.adaptive_max_pool2d(x, output))
    torch.testing.assert_close(mean, F.adaptive_avg_pool3d(x, (2, *output)))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, of its own pytrees
def test_a_network_without_such_operations_is_left_as_it_is() -> None:
    exported = torch.export.export(nn.ReLU(), (torch.randn(2, 3),))

    assert decomposed(exported) is exported
