"""Operations counted by hand: a multiply-add counts two."""

import numpy as np
import pytest
from offramp_contract.errors import SplitError
from offramp_exporter.cost import node_flops
from offramp_exporter.program import Program, program_of_model
from onnx import TensorProto, helper, numpy_helper


def flops(
    operator: str, inputs: dict[str, tuple[int, ...]], weights: dict[str, tuple[int, ...]], **attributes: object
) -> int:
    """Count one node whose inputs have a batch in front and whose weights have none."""
    node = helper.make_node(operator, [*inputs, *weights], ["y"], **attributes)
    graph = helper.make_graph(
        [node, helper.make_node("Flatten", ["y"], ["e"], axis=1)],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.zeros(shape, dtype=np.float32), name) for name, shape in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    program = program_of_model(model, {"exit_0": "e"})
    return node_flops(program, program.nodes[0])


def test_convolution() -> None:
    # 8 x 6 x 6 outputs, each a sum of 3 * 3 * 3 products, and a bias
    assert flops("Conv", {"x": (3, 8, 8)}, {"w": (8, 3, 3, 3), "b": (8,)}) == 8 * 36 * (2 * 27 + 1)


def test_grouped_convolution_reads_its_group_only() -> None:
    assert flops("Conv", {"x": (8, 8, 8)}, {"w": (8, 1, 3, 3)}, group=8) == 8 * 36 * 2 * 9


def test_strided_and_padded_convolution() -> None:
    assert flops("Conv", {"x": (3, 8, 8)}, {"w": (4, 3, 3, 3)}, strides=[2, 2], pads=[1, 1, 1, 1]) == 4 * 16 * 2 * 27


def test_transposed_convolution_spreads_every_input_element() -> None:
    # 3 x 8 x 8 inputs, each spread over 4 outputs x 2 x 2; 4 x 16 x 16 biases
    spread = 2 * (3 * 64) * (4 * 4)
    assert flops("ConvTranspose", {"x": (3, 8, 8)}, {"w": (3, 4, 2, 2), "b": (4,)}, strides=[2, 2]) == spread + 4 * 256


def test_linear_layer() -> None:
    assert flops("Gemm", {"x": (16,)}, {"w": (16, 10), "b": (10,)}) == 10 * (2 * 16 + 1)
    assert flops("Gemm", {"x": (16,)}, {"w": (10, 16)}, transB=1) == 10 * 2 * 16


def test_batched_matrix_product() -> None:
    # attention scores: 4 heads, 16 queries, 16 keys, width 8
    assert flops("MatMul", {"q": (4, 16, 8), "k": (4, 8, 16)}, {}) == 4 * 16 * 16 * 2 * 8


def test_pooling_looks_at_its_window() -> None:
    assert flops("MaxPool", {"x": (3, 8, 8)}, {}, kernel_shape=[2, 2], strides=[2, 2]) == 3 * 16 * 4
    assert flops("GlobalAveragePool", {"x": (3, 8, 8)}, {}) == 3 * 64


@pytest.mark.parametrize(
    ("operator", "each"), [("Relu", 1), ("Softmax", 5), ("LayerNormalization", 8), ("Identity", 0)]
)
def test_elementwise_operators(operator: str, each: int) -> None:
    weights = {"scale": (16,)} if operator == "LayerNormalization" else {}
    assert flops(operator, {"x": (4, 16)}, weights) == each * 64


def test_recurrent_layer_counts_every_step() -> None:
    # layout 1: (batch, length 5, width 6); 4 gates of 7 units; one direction
    weights = {"w": (1, 28, 6), "r": (1, 28, 7), "b": (1, 56)}
    per_step = 2 * 28 * (6 + 7) + 56 + 14 * 7
    assert flops("LSTM", {"x": (5, 6)}, weights, hidden_size=7, layout=1) == 5 * per_step


def test_an_unknown_operator_counts_its_outputs() -> None:
    assert flops("Erf", {"x": (4, 16)}, {}) == 64


def test_a_shape_that_is_not_known_is_an_error_not_a_zero() -> None:
    node = helper.make_node("MatMul", ["a", "b"], ["c"], name="mystery")
    program = Program((node,), {}, ("a", "b"), {"exit_0": "c"}, {}, {}, 18, (), 10)

    with pytest.raises(SplitError, match=r"mystery.*MatMul"):
        node_flops(program, node)
