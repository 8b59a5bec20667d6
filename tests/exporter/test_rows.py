"""The graph of a batch that is made of the graph of one row computes every row as if it were alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from offramp_contract.errors import TraceError
from offramp_exporter import export
from offramp_exporter.decompositions import decomposed
from offramp_exporter.quiet import overhearing
from offramp_exporter.rows.batch import per_row
from offramp_exporter.rows.one_row import OneRow
from offramp_exporter.rows.rules import rule_of
from onnx import ModelProto
from torch import Tensor, nn
from torch.nn import functional as F

Operation = Callable[[Tensor], Tensor]
NUM_ROWS = 5
IMAGE, TOKENS = (4, 6, 6), (5, 8)


def _by_its_own_numbers(x: Tensor) -> Tensor:
    return x[0][x.mean(2).argmax()]


def _written(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:3] = 0
    y[0, 0] = x[0].mean()
    return y


IMAGES: dict[str, Operation] = {
    "squeezed and put back": lambda x: x.squeeze().mean(0)[None],
    "one channel of the only image": lambda x: x[0, 1] * 2 + x[0].sum(0),
    "maximum of all there is": lambda x: x.max() - x.min() + x.mean(),
    "flattened without the batch": lambda x: x.view(-1)[3:40:2],
    "channels as the batch": lambda x: F.avg_pool2d(x.transpose(0, 1), 2) + 1,
    "channels as rows of a product": lambda x: x[0].flatten(1) @ x[0].flatten(1).T,
    "pools": lambda x: torch.cat([F.max_pool2d(x, 2), F.avg_pool2d(x, 2), F.adaptive_max_pool2d(x, 3)], 1),
    "pools of an image without its batch": lambda x: F.max_pool2d(x[0], 2),
    "normalised over channels": lambda x: F.normalize(x, dim=1) + x.norm(dim=(2, 3), keepdim=True),
    "instance normalised": lambda x: F.instance_norm(x) + F.group_norm(x, 2),
    "padded and cut": lambda x: F.pad(x, (1, 2, 0, 1))[:, ::2, 1:, :-1],
    "padded without the batch": lambda x: F.pad(x[0], (1, 1), value=2.0)[1:],
    "split and joined": lambda x: torch.cat(x.split(1, 1)[::-1], 3),
    "joined with a constant": lambda x: torch.cat([x[0], torch.ones(1, 6, 6)]),
    "stacked without the batch": lambda x: torch.stack([x[0, 0], x[0, 1] * 2]),
    "rolled and turned": lambda x: torch.roll(x, 1, 2).flip(3) + x.permute(0, 1, 3, 2),
    "resized": lambda x: F.interpolate(x, scale_factor=2),
    "shuffled": lambda x: F.pixel_shuffle(x, 2),
    "written in place": _written,
    "expanded": lambda x: x[0, 0, 0].expand(3, 6) + x.mean(),
    "repeated": lambda x: x.repeat(1, 2, 1, 1)[:, :, :2] + x[0, :1, :1].tile(2, 1),
}
SEQUENCES: dict[str, Operation] = {
    "softmax of every kind": lambda x: x.softmax(-1) + x[0].softmax(0) + x.log_softmax(1),
    "topk": lambda x: x.topk(2, 2)[0].sum() + x[0].topk(3, 0)[0].mean() + x.topk(2, 1)[0],
    "sorted": lambda x: x.sort(2, descending=True)[0] + x[0].sort(0)[0],
    "argmax without its axis": lambda x: F.one_hot(x[0].argmax(1), 8).float() * x[0],
    "argmax of all": lambda x: x.view(-1)[x.argmax()] + x.argmin(2).float(),
    "picked by its own numbers": _by_its_own_numbers,
    "gathered": lambda x: x.gather(2, x.topk(3, 2)[1]) + x[0].gather(1, x[0].argmax(1)[:, None]),
    "scattered": lambda x: torch.zeros_like(x).scatter(2, x.topk(2, 2)[1], 1.0),
    "looked up": lambda x: F.embedding(x.abs().long().clamp(max=3), torch.arange(8.0).view(4, 2)),
    "looked up without the batch": lambda x: torch.arange(12.0).view(4, 3)[x[0, :, 0].abs().long().clamp(max=3)],
    "where": lambda x: torch.where(x > x.mean(), x, x[0, 0]) + x.masked_fill(x > 0, -1.0),
    "cumulated": lambda x: x.cumsum(1) + x[0].cumsum(0) + x.cumsum(2),
    "einsum": lambda x: torch.einsum("bij,bkj->bik", x, x) + torch.einsum("ij,kj->ik", x[0], x[0]),
    "products": lambda x: (x @ torch.ones(8, 3)) * (x[0] @ torch.ones(8, 3)),
    "products with a constant on the left": lambda x: torch.ones(2, 5) @ x + torch.ones(2, 5) @ x[0],
    "products with a vector": lambda x: x @ torch.arange(8.0) + x[0] @ torch.ones(8),
    "vectors": lambda x: x[0, 0] @ x[0, 1] + x[0] @ x[0, 0] + torch.ones(5) @ x[0] @ torch.ones(8, 5),
    "of rank four": lambda x: (h := x.view(1, 5, 2, 4).transpose(1, 2)) @ h.transpose(2, 3),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.view(1, 5, 2, 4).transpose(1, 2)] * 3),
    "attention without the batch": lambda x: (x[0] @ x[0].T / 8**0.5).softmax(1) @ x[0],
    "layer norm": lambda x: F.layer_norm(x, (8,)) + F.layer_norm(x[0], (5, 8)),
    "any and all": lambda x: x * (x > 0).any(2, keepdim=True) + (x > -2).all().float(),
    "spread": lambda x: x.std(1, keepdim=True) + x.var() + x.logsumexp(2)[0][:, None] * x,
    "functions": lambda x: F.gelu(x) + F.silu(x) + x.erf() + x.exp().log1p() + x.abs().sqrt() + x.clamp(-1, 1) ** 2,
    "counted": lambda x: (x > 0).sum() * x + (x[0] > x[0].mean()).float().mean(0),
    "distances": lambda x: torch.cdist(x, x + 1) + F.cosine_similarity(x[0][:, None], x[0][None], dim=2),
    "whole numbers": lambda x: (x * 4).long() % 3 + (x * 4).long() // 3,
    "a diagonal": lambda x: x[:, :, :5].tril() + x[0, :, :5].triu(1),
}


class Operating(nn.Module):
    """Leaves the batch in front of what an operation gives."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x).float().reshape(1, -1)


class Recurring(nn.Module):
    """Recurrent layers, their states handed on, with the batch in front and behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.second = nn.GRU(12, 4)
        self.third = nn.LSTM(8, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.first(x)
        again, _ = self.third(x, (state[0][:1], state[1][:1]))
        last, hidden = self.second(out.transpose(0, 1))
        return torch.cat([again.flatten(), last.flatten(), hidden.flatten()])[None]


class Convolving(nn.Module):
    """Layers of images, some of an image without its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, groups=4)
        self.up, self.norm, self.line = nn.ConvTranspose2d(4, 2, 2, 2), nn.BatchNorm2d(4), nn.Conv1d(6, 3, 3)
        self.attention, self.linear = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.norm(self.conv(x)).relu()
        rows = self.line(features[0])
        attended, weights = self.attention(features[0], features[0], features[0])
        parts = [self.depthwise(features), self.up(x), rows, attended, weights, self.linear(x[0].flatten(1))]
        return torch.cat([part.flatten() for part in parts])[None]


def one_row_of(network: nn.Module, row: tuple[int, ...]) -> ModelProto:
    with overhearing():
        exported = decomposed(torch.export.export(network.eval(), (torch.randn(1, *row),), strict=False))
        written = torch.onnx.export(exported, dynamo=True, verbose=False, input_names=["x"])
    assert written is not None
    model: ModelProto = written.model_proto
    return model


def run(model: ModelProto, x: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"x": x.numpy()})
    return np.asarray(answer)


def compare(network: nn.Module, row: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(NUM_ROWS, *row) * torch.tensor([0.3, 1.0, 3.0, 1.0, 0.1]).view(-1, *[1] * len(row))
    with torch.no_grad():
        alone = np.concatenate([network(each[None]).numpy() for each in x])

    model = per_row(OneRow(one_row_of(network, row)), rule_of)

    np.testing.assert_allclose(run(model, x), alone, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(run(model, x[:1]), alone[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", IMAGES)
def test_of_images_every_row_is_computed_as_if_it_were_alone(name: str) -> None:
    compare(Operating(IMAGES[name]), IMAGE)


@pytest.mark.parametrize("name", SEQUENCES)
def test_of_sequences_every_row_is_computed_as_if_it_were_alone(name: str) -> None:
    compare(Operating(SEQUENCES[name]), TOKENS)


@pytest.mark.parametrize(("kind", "row"), [(Recurring, TOKENS), (Convolving, IMAGE)])
def test_layers_compute_every_row_as_if_it_were_alone(kind: type[nn.Module], row: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    compare(kind().eval(), row)


def test_an_operator_without_a_rule_is_refused_with_its_line_and_what_to_do() -> None:
    network = Operating(lambda x: torch.linalg.det(x[:, :, :5]))

    with pytest.raises(TraceError, match=r"Det at test_rows.py:\d+ .*cannot be computed for many rows") as refused:
        per_row(OneRow(one_row_of(network, TOKENS)), rule_of)
    assert "class AllExits" in refused.value.message


class WritesInPlace(nn.Module):
    """Blanks a part of its input, and leaves early."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(40, 3) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[0, 1:3] = x[0].mean()
        out: Tensor = self.heads[0](y.flatten(1))
        if out.softmax(1).max() > 0.5:
            return out
        return self.heads[1](y.flatten(1))  # type: ignore[no-any-return]


def test_a_network_that_writes_in_place_and_leaves_early_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)

    bundle = export(WritesInPlace().eval(), torch.randn(4, *TOKENS), tmp_path / "written")

    operators = {node.op_type for graph in bundle.graphs for node in onnx.load_from_string(graph).graph.node}
    assert "ScatterND" in operators
