"""From torch's operations to ONNX, beside what torch.onnx knows by itself: gates, and batch-norm as it is written.

torch.onnx rewrites every network into smaller operations before it translates it, which for a deep one takes half of
all the time. A network of operations that are translated as they stand is spared that.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from onnxscript import opset18
from torch.export import ExportedProgram
from torch.onnx import ONNXProgram

from offramp_exporter.gating.marks import gate_translations

_aten = torch.ops.aten

_AS_THEY_STAND: Final = {
    *(_aten.conv2d.default, _aten.batch_norm.default, _aten.linear.default, _aten.relu.default),
    *(_aten.max_pool2d.default, _aten.avg_pool2d.default, _aten.mean.dim, _aten.flatten.using_ints),
    *(_aten.add.Tensor, _aten.cat.default),
}
_WRITING: Final = {_aten.relu_.default: _aten.relu.default, _aten.add_.Tensor: _aten.add.Tensor}
"""What writes into its first argument, and what gives the same as a value of its own."""

_IN_TRAINING: Final = 5
"""Place of `training` among batch-norm's arguments; before it stand input, weight, bias, mean and variance."""


def translate(exported: ExportedProgram, input_names: Sequence[str], *, optimize: bool = True) -> ONNXProgram | None:
    """Write a traced network as an ONNX graph; None if torch.onnx writes nothing.

    Args:
        exported: The network.
        input_names: What the graph's inputs are called.
        optimize: Whether to fold constants and drop what does nothing.
    """
    table = gate_translations()
    nodes = [node for node in exported.graph.nodes if node.op not in ("placeholder", "output")]
    if all(map(_is_translated, nodes)):
        for node in nodes:
            node.target = _WRITING.get(node.target, node.target)
        table = {_aten.batch_norm.default: _batch_norm, **table}
        exported.run_decompositions = lambda table=None: exported
    return torch.onnx.export(
        exported,
        dynamo=True,
        verbose=False,
        input_names=list(input_names),
        optimize=optimize,
        custom_translation_table=table,
    )


def _is_translated(node: torch.fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target in _WRITING:
        return _is_read_once(node.args[0])
    if node.target not in _AS_THEY_STAND:
        return False
    is_norm = node.target is _aten.batch_norm.default
    return not is_norm or (None not in node.args[:_IN_TRAINING] and not node.args[_IN_TRAINING])


def _is_read_once(value: Any) -> bool:
    """Tell whether writing into a value is seen by nobody: it is no view, and whoever writes is alone to read it."""
    fresh = (_AS_THEY_STAND | _WRITING.keys()) - {_aten.flatten.using_ints}
    return value.op == "call_function" and value.target in fresh and len(value.users) == 1


def _batch_norm(  # noqa: PLR0917  (the arguments are aten's)
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    del training, momentum, cudnn_enabled
    return opset18.BatchNormalization(x, weight, bias, mean, variance, epsilon=eps)
