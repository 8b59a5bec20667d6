"""A float32 model, written in float16 by ONNX Runtime's own converter."""

import sys
from collections.abc import Sequence

from onnx import ModelProto


def in_half(model: ModelProto, kept: Sequence[str]) -> ModelProto:
    """Write a model with float16 weights and values; operators that know no float16 keep float32, between casts.

    Args:
        model: With the types of its inputs and outputs. It may be changed.
        kept: Names of inputs and outputs that stay float32.

    Returns:
        The model, its nodes in no particular order.
    """
    path = list(sys.path)
    try:  # the package puts its own folder on the path, with modules of everyday names
        from onnxruntime.transformers.float16 import convert_float_to_float16
    finally:
        sys.path[:] = path
    converted: ModelProto = convert_float_to_float16(model, keep_io_types=list(kept))
    return converted
