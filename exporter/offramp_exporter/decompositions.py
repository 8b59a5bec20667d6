"""Operations that torch.onnx cannot translate, or translates into what ONNX Runtime refuses, by others that it can.

Each is exact, and applied only to a network that uses it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.export import ExportedProgram

_aten = torch.ops.aten
_MAX_UNROLLED: Final = 256


def decomposed(exported: ExportedProgram) -> ExportedProgram:
    """Rewrite a traced network without the operations that have a decomposition here."""
    packets = {_packet(target) for target in DECOMPOSITIONS}
    graphs = [graph.graph for graph in exported.graph_module.modules() if isinstance(graph, torch.fx.GraphModule)]
    used = {_packet(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}
    return exported.run_decompositions(dict(DECOMPOSITIONS)) if used & packets else exported


def _packet(target: object) -> str:
    return str(getattr(target, "overloadpacket", "")).removesuffix("_")


def _windows(size: int, num_windows: int) -> list[tuple[int, int]]:
    """Give start and length of torch's adaptive windows: from floor(i n / o) to ceil((i + 1) n / o)."""
    bounds = [(i * size // num_windows, -(-(i + 1) * size // num_windows)) for i in range(num_windows)]
    return [(start, stop - start) for start, stop in bounds]


def _pooled(x: Tensor, sizes: Sequence[int], reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Pool one axis after the other: a window is a box, over which maximum and mean fall apart into axes."""
    for axis, num_windows in zip(range(-len(sizes), 0), sizes, strict=True):
        windows = _windows(x.shape[axis], num_windows)
        if num_windows == x.shape[axis]:
            continue
        x = torch.stack([reduce(x.narrow(axis, *window), axis) for window in windows], axis)
    return x


def _adaptive_max_pool(x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    return _without_indices(_pooled(x, output_size, lambda window, axis: window.amax(axis)))


def _adaptive_avg_pool3d(x: Tensor, output_size: Sequence[int]) -> Tensor:
    return _pooled(x, output_size, lambda window, axis: window.mean(axis))


def _without_indices(values: Tensor) -> tuple[Tensor, Tensor]:
    # Out of range: whoever reads them gets an error from ONNX Runtime, or a parity failure, and never a wrong bundle.
    return values, torch.full_like(values, -(2**62), dtype=torch.int64)


def _median(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _kthvalue(x, (x.shape[dim] + 1) // 2, dim, keepdim)


def _kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    values, indices = x.sort(dim)
    picked = values.narrow(dim, k - 1, 1), indices.narrow(dim, k - 1, 1)
    return picked if keepdim else (picked[0].squeeze(dim), picked[1].squeeze(dim))


def _index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """`x[mask] = number`: torch.onnx looks up where the mask is true, which makes sizes depend on data."""
    *before, mask = indices
    is_mask = mask is not None and mask.dtype is torch.bool and all(index is None for index in before)
    if not is_mask or mask is None or accumulate or values.numel() != 1:
        return NotImplemented
    around = (1,) * len(before), (1,) * (x.ndim - mask.ndim - len(before))
    return torch.where(mask.reshape(*around[0], *mask.shape, *around[1]), values.reshape(()).to(x.dtype), x)


def _scatter_add(x: Tensor, dim: int, index: Tensor, src: Tensor) -> Any:
    cut = _like_index(src, index)
    return NotImplemented if cut is src else _aten.scatter_add.default(x, dim, index, cut)


def _scatter(x: Tensor, dim: int, index: Tensor, src: Tensor) -> Any:
    cut = _like_index(src, index)
    return NotImplemented if cut is src else _aten.scatter.src(x, dim, index, cut)


def _like_index(src: Tensor, index: Tensor) -> Tensor:
    """Cut off what an index does not reach: torch ignores it, ONNX refuses it."""
    for axis, (size, wanted) in enumerate(zip(src.shape, index.shape, strict=True)):
        if isinstance(size, int) and isinstance(wanted, int) and size != wanted:
            src = src.narrow(axis, 0, wanted)
    return src


def _cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    size = x.shape[dim]
    if not isinstance(size, int) or not 0 < size <= _MAX_UNROLLED:
        return NotImplemented
    first, *others = (x if dtype is None else x.to(dtype)).unbind(dim)
    products = [first]
    for other in others:
        products.append(products[-1] * other)
    return torch.stack(products, dim)


def _cdist(a: Tensor, b: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Any:
    del compute_mode
    distance = a.unsqueeze(-2) - b.unsqueeze(-3)
    if p == 2:
        return distance.square().sum(-1).sqrt()
    return distance.abs().sum(-1) if p == 1 else NotImplemented


def _searchsorted(
    boundaries: Tensor,
    values: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Any:
    if boundaries.ndim != 1 or sorter is not None:
        return NotImplemented
    raised = values.unsqueeze(-1)
    below = boundaries <= raised if right or side == "right" else boundaries < raised
    return below.sum(-1).to(torch.int32 if out_int32 else torch.int64)


def _amax(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    return x.max() if not dim and not keepdim else NotImplemented


def _amin(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    return x.min() if not dim and not keepdim else NotImplemented


DECOMPOSITIONS: Final[dict[Any, Callable[..., Any]]] = {
    _aten.adaptive_max_pool1d.default: _adaptive_max_pool,
    _aten.adaptive_max_pool2d.default: _adaptive_max_pool,
    _aten.adaptive_max_pool3d.default: _adaptive_max_pool,
    _aten.adaptive_avg_pool3d.default: _adaptive_avg_pool3d,
    _aten._adaptive_avg_pool3d.default: _adaptive_avg_pool3d,
    _aten.median.dim: _median,
    _aten.kthvalue.default: _kthvalue,
    _aten.index_put.default: _index_put,
    _aten.scatter_add.default: _scatter_add,
    _aten.scatter.src: _scatter,
    _aten.amax.default: _amax,
    _aten.amin.default: _amin,
    _aten.cumprod.default: _cumprod,
    _aten.cdist.default: _cdist,
    _aten._cdist_forward.default: _cdist,
    _aten.searchsorted.Tensor: _searchsorted,
}
