"""The same program in float16: half the weights, half of what is carried, and the fast path of a GPU's matrix units.

Model inputs stay float32, and so does what leaves the accelerator for a decision: the scores of the network's own rules
are cast back here; logits, gates' scores and decision statistics are float32 in every stage graph.
"""

from typing import Literal, TypeAlias

import onnx_ir as ir
from offramp_runtime.half import in_half
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from offramp_exporter.gating.marks import DOMAIN
from offramp_exporter.program import Program, program_of_model
from offramp_exporter.sizes import BATCH_SIZE

Precision: TypeAlias = Literal["fp32", "fp16"]


def half_program(program: Program) -> Program:
    """Write a program in float16; one that computes in float16 already stays as it is.

    Raises:
        TraceError: If what comes out is no program any more, which no network should be able to cause.
    """
    if is_half(program):
        return program
    converted = in_half(_model(program), [*program.inputs, *program.natives.values()])
    model = ir.from_proto(converted)
    model.graph.sort()
    return program_of_model(
        ir.to_proto(model), program.exits, is_one_row=program.is_one_row, natives=dict(program.natives)
    )


def is_half(program: Program) -> bool:
    """Tell whether an exit's scores are computed in float16."""
    return any(program.dtypes.get(scores) == TensorProto.FLOAT16 for scores in program.exits.values())


def _model(program: Program) -> ModelProto:
    nodes = list(program.nodes)
    if any(BATCH_SIZE in node.input for node in nodes):
        nodes.insert(0, helper.make_node("Shape", [program.inputs[0]], [BATCH_SIZE], start=0, end=1))
    outputs = dict.fromkeys((*program.exits.values(), *program.natives.values()))
    graph = helper.make_graph(
        nodes,
        "program",
        [program.info(name) for name in program.inputs],
        [_typed(program, name) for name in outputs],
        list(program.initializers.values()),
    )
    imports = [*program.opset_imports, *([helper.make_opsetid(DOMAIN, 1)] if program.marks else [])]
    return helper.make_model(graph, opset_imports=imports, ir_version=program.ir_version)


def _typed(program: Program, name: str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, program.dtypes[name], None)
