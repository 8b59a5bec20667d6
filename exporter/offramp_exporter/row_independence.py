"""What a row is answered must not depend on the rows beside it: batches are re-formed between stages."""

from typing import Final

import numpy as np
from offramp_contract.errors import SplitError
from onnx import NodeProto

from offramp_exporter.batch_range import BatchRange, Reference
from offramp_exporter.examples import Examples
from offramp_exporter.program import Program
from offramp_exporter.refusal import line_of_node
from offramp_exporter.split import Kind, classify
from offramp_exporter.values import Rows, Shape

_TOLERANCE: Final = 1e-3
"""Far above what a library's choice of kernel does at another batch size, far below what a neighbour does."""

_HALF_TOLERANCE: Final = 5e-2


def prove_rows_independent(reference: Reference, program: Program, examples: Examples, batches: BatchRange) -> None:
    """Look for a value of the whole batch, and ask the network for each row alone and for all of them together.

    Raises:
        SplitError: If a row's answer depends on other rows, naming the line that mixes them if it can be told.
    """
    mixing = None if program.is_one_row else mixing_node(program)
    if mixing is not None:
        line = line_of_node(mixing)
        raise SplitError(_sentence(f", at {line}" if line else f", in node {mixing.name or mixing.output[0]!r}"))
    together, alone = batches.proved[-1], batches.smallest
    if together == alone:
        return
    inputs = examples.random(together, seed=together)
    expected = reference(inputs)
    is_half = any(array.dtype == np.float16 for array in (*inputs.arrays.values(), *expected))
    tolerance = _HALF_TOLERANCE if is_half else _TOLERANCE
    for row in range(together):
        answers = reference(inputs.rows([row] * alone))
        for scores_BC, alone_BC, exit_ in zip(expected, answers, program.exits, strict=True):
            if not np.isclose(alone_BC[0], scores_BC[row], rtol=tolerance, atol=tolerance, equal_nan=True).all():
                raise SplitError(_sentence(f" at exit {exit_!r}"))


def _sentence(where: str) -> str:
    return (
        f"the answer of a row depends on the rows beside it{where}; statistics over the batch (mean(0), BatchNorm "
        "without running statistics or in training mode) and decisions for the whole batch (torch.all, max()) must "
        "become per row, such as x.mean(1)"
    )


def mixing_node(program: Program) -> NodeProto | None:
    """Find the first node whose result has lost the batch, if there is one."""
    kinds = classify(program)
    for node in program.nodes:
        reads_rows = any(
            kinds[name] is Kind.DATA and _has_rows(program.shapes.get(name)) for name in node.input if name
        )
        shape = program.shapes.get(node.output[0])
        if reads_rows and kinds[node.output[0]] is Kind.DATA and shape is not None and not _may_have_rows(shape):
            return node
    return None


def _has_rows(shape: Shape | None) -> bool:
    return shape is not None and any(isinstance(dim, Rows) for dim in shape)


def _may_have_rows(shape: Shape) -> bool:
    return None in shape or _has_rows(shape)
