from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_contract.errors import SplitError
from offramp_exporter.boundary import crossings
from offramp_exporter.cost import carry_bytes
from offramp_exporter.program import Program, program_of_model
from offramp_exporter.split import StagePlan, split
from offramp_exporter.verify import prove_structure
from onnx import TensorProto, helper, numpy_helper, parser

HEADER = '<ir_version: 10, opset_import: ["" : 18]>\n'


def program_of(text: str, *exits: str) -> Program:
    model = parser.parse_model(HEADER + text)
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    model.graph.initializer.append(weight)
    return program_of_model(model, {f"exit_{i}": tensor for i, tensor in enumerate(exits)})


def operators(program: Program, indices: tuple[int, ...]) -> list[str]:
    return [program.nodes[i].op_type for i in indices]


def boundaries(plans: tuple[StagePlan, ...]) -> list[set[str]]:
    return [set(plan.reads) for plan in plans]


def test_a_chain_is_cut_behind_each_exit_and_carries_one_feature_map() -> None:
    program = program_of(
        """chain (float[B, 4] x) => (float[B, 4] e0, float[B, 4] e1) {
        h0 = MatMul(x, w)  a0 = Relu(h0)  e0 = MatMul(a0, w)
        h1 = MatMul(a0, w)  e1 = MatMul(h1, w) }""",
        "e0",
        "e1",
    )

    plans = split(program)

    assert [operators(program, plan.nodes) for plan in plans] == [["MatMul", "Relu", "MatMul"], ["MatMul", "MatMul"]]
    assert boundaries(plans) == [{"x"}, {"a0"}]
    assert [plan.emits for plan in plans] == [("a0",), ()]


def test_heads_that_come_last_in_program_order_join_the_stage_they_need() -> None:
    program = program_of(
        """late (float[B, 4] x) => (float[B, 4] e0, float[B, 4] e1) {
        h0 = Relu(x)  h1 = Tanh(h0)  h2 = Sigmoid(h1)  e1 = MatMul(h2, w)  e0 = MatMul(h0, w) }""",
        "e0",
        "e1",
    )

    first, second = split(program)

    assert operators(program, first.nodes) == ["Relu", "MatMul"]
    assert operators(program, second.nodes) == ["Tanh", "Sigmoid", "MatMul"]


def test_a_densely_connected_network_carries_every_earlier_feature() -> None:
    program = program_of(
        """dense (float[B, 4] x) => (float[B, 4] e0, float[B, 4] e1, float[B, 4] e2)
        <int64[1] zero = {0}, int64[1] one = {1}, int64[1] four = {4}> {
        f0 = MatMul(x, w)  e0 = MatMul(f0, w)
        c1 = Concat<axis = 1>(x, f0)  f1 = Relu(c1)  s1 = Slice(f1, zero, four, one)  e1 = MatMul(s1, w)
        c2 = Concat<axis = 1>(x, f0, f1)  f2 = Relu(c2)  s2 = Slice(f2, zero, four, one)  e2 = MatMul(s2, w) }""",
        "e0",
        "e1",
        "e2",
    )

    plans = split(program)
    crossing = crossings(program, plans)

    assert boundaries(plans) == [{"x"}, {"x", "f0"}, {"x", "f0", "f1"}]
    # behind stage 0: x and f0, 4 floats each; behind stage 1 also f1, 8 floats
    assert [carry_bytes(plans, crossing, k) for k in range(3)] == [32, 64, 0]


def test_an_ensemble_over_earlier_exits_carries_the_feature_map_and_the_running_sum_only() -> None:
    program = program_of(
        """ensemble (float[B, 4] x) => (float[B, 4] e0, float[B, 4] e1, float[B, 4] e2) {
        f0 = Relu(x)  e0 = MatMul(f0, w)
        f1 = Tanh(f0)  z1 = MatMul(f1, w)  e1 = Add(e0, z1)
        f2 = Tanh(f1)  z2 = MatMul(f2, w)  e2 = Add(e1, z2) }""",
        "e0",
        "e1",
        "e2",
    )

    plans = split(program)

    assert boundaries(plans) == [{"x"}, {"f0", "e0"}, {"f1", "e1"}]


def test_constants_are_computed_in_each_stage_that_reads_them_and_never_carried() -> None:
    program = program_of(
        """shared (float[B, 4] x) => (float[B, 4] e0, float[B, 4] e1) {
        c = Transpose<perm = [1, 0]>(w)  e0 = MatMul(x, c)  h = Relu(e0)  e1 = MatMul(h, c) }""",
        "e0",
        "e1",
    )

    first, second = split(program)

    assert operators(program, first.support) == operators(program, second.support) == ["Transpose"]
    assert second.reads == ("e0",)


def test_the_batch_size_is_never_carried() -> None:
    program = program_of(
        """sizes (float[B, 4] x) => (float[B, 4] e0, float[B, 4] e1) <int64[1] two = {2}, int64[1] four = {4}> {
        n = Shape<start = 0, end = 1>(x)
        pairs = Concat<axis = 0>(n, two, two)  flat = Concat<axis = 0>(n, four)
        folded = Reshape(x, pairs)  f0 = Relu(folded)  e0 = Reshape(f0, flat)
        f1 = Tanh(f0)  e1 = Reshape(f1, flat) }""",
        "e0",
        "e1",
    )

    first, second = split(program)

    assert second.reads == ("f0",)
    assert "Shape" not in operators(program, (*first.nodes, *second.nodes, *first.support, *second.support))
    assert operators(program, second.support) == ["Concat", "Concat"]


def test_a_node_with_several_outputs_stays_whole() -> None:
    program = program_of(
        """split (float[B, 4] x) => (float[B, 2] e0, float[B, 2] e1) {
        left, right = Split<axis = 1, num_outputs = 2>(x)  e0 = Relu(left)  e1 = Tanh(right) }""",
        "e0",
        "e1",
    )

    first, second = split(program)

    assert operators(program, first.nodes) == ["Split", "Relu"]
    assert second.reads == ("right",)


@pytest.mark.parametrize(
    ("text", "exits", "sentence"),
    [
        ("e0 = MatMul(x, w)  h = Relu(e0)", ("e0", "e0"), "needs nothing that the exits before it do not compute"),
        ("h = Relu(x)  e0 = Tanh(h)  e1 = Sigmoid(e0)", ("e1", "e0"), "exit_1.*e0.*needs nothing"),
        ("e0 = Relu(x)  e1 = Identity(e0)", ("e0", "e1"), "exit_1.*needs nothing"),
        ("r = RandomNormalLike(x)  e0 = Add(x, r)", ("e0",), "RandomNormalLike.*draws random numbers"),
        (
            "n = Shape<start = 0, end = 1>(x)  c = Concat<axis = 0>(n, n4)  e0 = Expand(one, c)",
            ("e0",),
            "does not depend on the network's input",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(text: str, exits: tuple[str, ...], sentence: str) -> None:
    constants = "<int64[1] n4 = {4}, float[1, 4] one = {1, 1, 1, 1}>"
    program = program_of(f"g (float[B, 4] x) => (float[B, 4] e0) {constants} {{ {text} }}", *exits)

    with pytest.raises(SplitError, match=sentence):
        split(program)


def test_control_flow_inside_the_graph_is_refused_naming_the_node() -> None:
    branch = helper.make_graph([helper.make_node("Relu", ["x"], ["out"])], "b", [], [_info("out")])
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
                helper.make_node("Cast", ["sum"], ["condition"], to=TensorProto.BOOL),
                helper.make_node("If", ["condition"], ["y"], name="leave?", then_branch=branch, else_branch=branch),
            ],
            "g",
            [_info("x")],
            [_info("y")],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
    )

    with pytest.raises(SplitError, match=r"leave\?.*\(If\)"):
        split(program_of_model(model, {"exit_0": "y"}))


def test_a_value_of_the_whole_batch_cannot_cross() -> None:
    program = program_of(
        """g (float[B, 4] x) => (float[B, 4] e0, float[B, 4] e1) {
        m = ReduceMean<keepdims = 0>(x)  e0 = Add(x, m)  h = Relu(x)  e1 = Mul(h, m) }""",
        "e0",
        "e1",
    )

    with pytest.raises(SplitError, match=r"'m' of shape \(\).*no axis of it is the batch"):
        crossings(program, split(program))


def test_a_carry_with_its_batch_elsewhere_crosses_with_the_batch_in_front() -> None:
    program = program_of(
        """g (float[B, 3, 4] x) => (float[B, 4] e0, float[B, 4] e1) <int64[1] zero = {0}> {
        t = Transpose<perm = [1, 0, 2]>(x)  s = Relu(t)  e0 = ReduceSum<keepdims = 0>(s, zero)
        u = Tanh(s)  e1 = ReduceSum<keepdims = 0>(u, zero) }""",
        "e0",
        "e1",
    )

    crossing = crossings(program, split(program))["s"]

    assert not crossing.is_as_promised
    assert crossing.tensor.shape == (3, 4)
    assert [node.op_type for node in crossing.store()] == ["Reshape", "Transpose"]


def test_names_from_other_frameworks_become_safe_and_stay_different() -> None:
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Relu", ["x"], ["/block/1/Relu:0"]),
                helper.make_node("Tanh", ["x"], ["block 1.Relu.0"]),
                helper.make_node("Tanh", ["x"], ["block/1/Relu/0"]),
                helper.make_node("Sum", ["/block/1/Relu:0", "block 1.Relu.0", "block/1/Relu/0"], ["e0"]),
                helper.make_node("Sum", ["/block/1/Relu:0", "block 1.Relu.0", "block/1/Relu/0", "x"], ["e1"]),
            ],
            "g",
            [_info("x")],
            [_info("e0"), _info("e1")],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
    )
    program = program_of_model(model, {"exit_0": "e0", "exit_1": "e1"})

    names = [crossing.tensor.name for crossing in crossings(program, split(program)).values()]

    assert names == ["x", "block_1_Relu_0", "block_1.Relu.0", "block_1_Relu_0_2"]


@st.composite
def networks(draw: st.DrawFn) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A random network: each value is the sum of some earlier ones; some values are exits."""
    values, nodes = ["x"], []
    for index in range(draw(st.integers(2, 12))):
        sources = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
        nodes.append(helper.make_node("Sum", [*sources, values[-1]], [f"v{index}"]))
        values.append(f"v{index}")
    ends = draw(st.sets(st.integers(0, len(nodes) - 1), min_size=1, max_size=4))
    exits = {f"exit_{k}": f"v{end}" for k, end in enumerate(sorted(ends))}
    graph = helper.make_graph(nodes, "g", [_info("x")], [_info(values[-1])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), exits


@given(networks())
def test_every_node_is_in_exactly_one_stage_and_reads_only_what_is_there(network: tuple[Any, dict[str, str]]) -> None:
    program = program_of_model(*network)

    plans = split(program)

    prove_structure(program, plans)
    held = [i for plan in plans for i in plan.nodes]
    assert sorted(held) == list(range(len(program.nodes)))
    known = {"x"}
    for plan in plans:
        assert set(plan.reads) <= known
        known |= set(plan.emits)
    assert plans[-1].emits == ()


def _info(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4])
