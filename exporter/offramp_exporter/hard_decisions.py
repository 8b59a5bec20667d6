"""Where a network decides hard: a threshold, an argmax or a top-k turns a rounding error into another answer."""

from typing import Final

from onnx import TensorProto

from offramp_exporter.gating.marks import is_gate
from offramp_exporter.program import Program
from offramp_exporter.refusal import line_of_node
from offramp_exporter.split import Kind, classify

_OPERATORS: Final = {
    *("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"),
    *("ArgMax", "ArgMin", "TopK", "Round", "Floor", "Ceil", "Sign"),
}
_FLOATS: Final = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE}


def hard_decisions(program: Program) -> list[str]:
    """Give the lines that decide hard by a number with data in it, in order, or the operator where no line is known."""
    kinds = classify(program)
    decided = {mark.decision for mark in program.marks}
    found: dict[str, None] = {}
    for node in program.nodes:
        if not is_gate(node) and all(name in decided or kinds[name] is not Kind.DATA for name in node.input if name):
            decided.update(node.output)  # by a gate alone, whose threshold is named where rows fall on it
        read = node.input[0] if node.input else ""
        is_by_data = kinds[node.output[0]] is Kind.DATA and program.dtypes.get(read) in _FLOATS and read not in decided
        if node.op_type in _OPERATORS and is_by_data:
            found[line_of_node(node) or node.op_type] = None
    return list(found)
