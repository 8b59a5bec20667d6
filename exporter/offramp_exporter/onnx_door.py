"""The third door: an ONNX file that already computes every exit, from any framework."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from offramp_contract.errors import ManifestError, TraceError
from offramp_contract.statistics import FloatArray
from offramp_runtime import Device
from onnx import ModelProto, TensorProto, ValueInfoProto, checker, helper

from offramp_exporter.batch_range import Reference
from offramp_exporter.examples import Examples, require_row_size
from offramp_exporter.exits import ExitNames
from offramp_exporter.program import Program, inputs_of, program_of_model
from offramp_exporter.values import DTYPE_NAMES


def read_onnx(path: Path) -> ModelProto:
    """Read an ONNX file, with the weights that lie beside it.

    Raises:
        TraceError: If it is none, or is not valid.
    """
    if not path.is_file():
        raise TraceError(f"{str(path)!r} is no file; give the path of an ONNX file")
    try:
        model = onnx.load(path)
        checker.check_model(model)
    except (DecodeError, checker.ValidationError, OSError, ValueError) as error:
        raise TraceError(f"{path.name!r} is no valid ONNX file: {str(error).splitlines()[0]}") from error
    return model


def program_of_file(
    model: ModelProto, exits: ExitNames, example_inputs: Mapping[str, np.ndarray] | None
) -> tuple[Program, ModelProto, Examples]:
    """Make a program of an ONNX model.

    Args:
        model: With a symbolic batch on axis 0 of every input.
        exits: Names of the tensors that hold the exits' scores, in order, intermediate ones too; or the exits' names,
            each with its tensor.
        example_inputs: Inputs by name; they fix dimensions beside the batch that are dynamic. Without them the network
            is proved on random inputs only.

    Returns:
        The program; the model with the exits as outputs; and the inputs to prove it with.

    Raises:
        TraceError: Saying what stands in the way and what to do.
    """
    whole = ModelProto.FromString(model.SerializeToString())
    inputs = inputs_of(whole)
    examples = Examples(dict(example_inputs) if example_inputs else {v.name: _example(v) for v in inputs})
    if set(examples.arrays) != {value.name for value in inputs}:
        raise TraceError(f"the example inputs must be named as the graph's: {', '.join(v.name for v in inputs)}")
    for value in inputs:
        _fix_sizes(value, examples.arrays[value.name])
    named = exits if isinstance(exits, Mapping) else {f"exit_{index}": name for index, name in enumerate(exits)}
    if not named:
        raise TraceError("exits: name the tensors that hold the exits' scores, in the order of depth")
    program = program_of_model(whole, named)
    del whole.graph.output[:]
    whole.graph.output.extend(
        helper.make_tensor_value_info(tensor, program.dtypes.get(tensor, TensorProto.FLOAT), None)
        for tensor in dict.fromkeys(named.values())
    )
    return program, whole, examples


def whole_graph_reference(model: ModelProto, exits: Sequence[str], device: Device) -> Reference:
    """Give the whole graph in one session as the network that the stages must equal.

    Raises:
        TraceError: If ONNX Runtime refuses the graph.
    """
    try:
        session = device.load(model.SerializeToString(), "the whole network")
    except ManifestError as error:
        raise TraceError("ONNX Runtime refuses the ONNX file; a bundle's stages run on it") from error

    def reference(inputs: Examples) -> list[FloatArray]:
        _, scores = device.run(session, inputs.arrays, [], list(exits))
        return scores

    return reference


def _example(value: ValueInfoProto) -> np.ndarray:
    dtype = np.dtype(DTYPE_NAMES.get(value.type.tensor_type.elem_type, "float32"))
    row = [dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]]
    require_row_size(f"input {value.name!r}", row)
    # Row 0 of zeros and row 1 of ones: random inputs like it have the spread of one, and integers are 0 or 1.
    example = np.zeros((2, *row), dtype)
    example[1:] = 1
    return example


def _fix_sizes(value: ValueInfoProto, example: np.ndarray) -> None:
    dims = value.type.tensor_type.shape.dim
    if len(dims) != example.ndim:
        raise TraceError(f"example input {value.name!r} has {example.ndim} axes, the graph's has {len(dims)}")
    for dim, size in list(zip(dims, example.shape, strict=True))[1:]:
        if dim.HasField("dim_value") and dim.dim_value != size:
            raise TraceError(f"example input {value.name!r} has shape {example.shape}, which the graph does not take")
        if size:
            dim.dim_value = size
