"""Fixing decisions in a graph: what folds, what stays, and what each node's gates are."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_contract.errors import SplitError
from offramp_exporter.boundary import crossings
from offramp_exporter.cost import carry_bytes
from offramp_exporter.examples import Examples
from offramp_exporter.gating.fold import Constants, Folding
from offramp_exporter.gating.interpret import Interpreter
from offramp_exporter.gating.marks import register_operator
from offramp_exporter.gating.proof import prove_spared
from offramp_exporter.gating.specialize import specialize
from offramp_exporter.program import Program, program_of_model
from offramp_exporter.split import split
from offramp_exporter.verify import prove_structure
from offramp_runtime import open_device
from onnx import numpy_helper, parser

HEADER = '<ir_version: 10, opset_import: ["" : 20, "offramp" : 1]>\n'
ONES = ", ".join(["1"] * 4)


def program_of(body: str, exit_: str = "y") -> Program:
    """Make a program of 4 features whose gate `d` is scored by `s` (B, 1), which `body` goes on with."""
    register_operator()
    model = parser.parse_model(
        f"""{HEADER} graph (float[B, 4] x) => (float[B, 4] {exit_}) <float[4,1] v = {{1, -1, 1, -1}}, float one = {{1}},
        float zero = {{0}}, float half = {{0.5}}, float[1, 4] ones = {{{ONES}}}, int64[1] axis = {{1}}> {{
        z = MatMul(x, v)  s = Sigmoid(z)  d = offramp.Gate<threshold = 0.5, name = "g">(s)
        {body} }}"""
    )
    model.graph.initializer.append(numpy_helper.from_array(np.eye(4, dtype=np.float32) * 2, "w"))
    return program_of_model(model, {"exit_0": exit_})


def operators(program: Program, *, gated: bool) -> list[str]:
    return [program.nodes[i].op_type for plan in split(program) if bool(plan.gates) is gated for i in plan.nodes]


ADDED = "f = MatMul(x, w)  g = Mul(d, f)  r = Add(x, g)  y = Tanh(r)"


@pytest.mark.parametrize(
    ("body", "inside"),
    [
        (ADDED, ["MatMul", "Add"]),
        ("f = MatMul(x, w)  g = Mul(f, d)  h = Mul(g, half)  r = Add(h, x)  y = Tanh(r)", ["MatMul", "Mul", "Add"]),
        ("f = MatMul(x, w)  c = Greater(d, half)  r = Where(c, f, x)  y = Tanh(r)", ["MatMul"]),
        ("f = MatMul(x, w)  c = Cast<to = 9>(d)  n = Not(c)  r = Where(n, x, f)  y = Tanh(r)", ["MatMul"]),
        ("f = MatMul(x, w)  n = Sub(one, d)  a = Mul(d, f)  b = Mul(n, x)  r = Add(a, b)  y = Tanh(r)", ["MatMul"]),
        ("f = MatMul(x, w)  m = Mul(d, ones)  a = Mul(m, f)  r = Add(a, x)  y = Tanh(r)", ["MatMul", "Add"]),
        (
            "f = MatMul(x, w)  m = Add(d, one)  g = Mul(d, f)  a = Add(x, g)  r = Div(a, m)  y = Tanh(r)",
            ["MatMul", "Add", "Div"],
        ),
    ],
)
def test_a_body_is_what_only_an_open_gate_needs(body: str, inside: list[str]) -> None:
    program = specialize(program_of(body))

    found = operators(program, gated=True)

    assert found == inside
    assert "Tanh" in operators(program, gated=False)


def test_two_stages_of_trunk_stand_around_a_body_and_carry_what_is_needed() -> None:
    traced = program_of(ADDED)
    program = specialize(traced)
    plans = split(program)
    prove_structure(program, plans)
    prove_spared(traced, program, plans)

    assert [plan.gates for plan in plans] == [(), (0,), ()]
    assert [plan.scored for plan in plans] == [(0,), (), ()]
    assert [(one.run, one.skip) for one in plans[1].merges] == [("r", "x")]
    assert plans[2].reads == ("r",)
    crossing = crossings(program, plans)
    assert [carry_bytes(plans, crossing, stage) for stage in range(3)] == [16, 16, 0]


def test_what_a_shut_gate_still_needs_is_kept_alive_for_its_merge() -> None:
    program = specialize(
        program_of("k = Tanh(x)  f = MatMul(x, w)  c = Greater(d, half)  r = Where(c, f, k)  y = Exp(r)")
    )
    plans = split(program)

    assert "k" not in plans[1].reads
    assert "k" in plans[0].emits
    assert carry_bytes(plans, crossings(program, plans), 0) == 32


def test_shapes_that_differ_by_broadcasting_are_no_shortcut() -> None:
    # 1 * e would be e itself, were the product not of another shape.
    program = specialize(program_of("m = Mul(d, ones)  e = MatMul(x, v)  g = Mul(m, e)  r = Add(x, g)  y = Tanh(r)"))

    assert operators(program, gated=True) == ["MatMul", "Mul", "Add"]


def test_a_relu_does_nothing_to_what_went_through_one() -> None:
    program = specialize(
        program_of("k = Relu(x)  f = MatMul(k, w)  g = Mul(d, f)  a = Add(k, g)  r = Relu(a)  y = Tanh(r)")
    )

    assert operators(program, gated=True) == ["MatMul", "Add", "Relu"]
    assert [(one.run, one.skip) for one in split(program)[1].merges] == [("r", "k")]


def test_a_graph_without_gates_is_given_back_as_it_is() -> None:
    program = program_of("y = Tanh(x)")
    assert program.marks == ()
    assert specialize(program) is program


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            "f = MatMul(x, w)  a = Concat<axis = 1>(d, d, d, d)  r = Max(a, f)  y = Tanh(r)",
            r"\(Max\) reads the decision",
        ),
        ("q = Shape(x)  f = MatMul(x, w)  m = Expand(d, q)  y = Max(m, f)", "reads the decision"),
        ("f = MatMul(x, w)  c = Greater(d, half)  r = Where(c, x, f)  y = Tanh(r)", "spares nothing"),
        ("m = Mul(d, ones)  y = Add(m, zero)", "nothing but the decision of gate 'g'"),
    ],
)
def test_what_cannot_be_seen_through_or_spares_nothing_is_refused(body: str, sentence: str) -> None:
    traced = program_of(body)
    with pytest.raises(SplitError, match=sentence):
        prove_spared(traced, program := specialize(traced), split(program))


def test_a_score_that_is_not_one_number_a_row_is_refused() -> None:
    register_operator()
    model = parser.parse_model(
        f"""{HEADER} graph (float[B, 4] x) => (float[B, 4] y)  {{
        d = offramp.Gate<threshold = 0.5, name = "g">(x)  f = Tanh(x)  g = Mul(d, f)  y = Add(x, g) }}"""
    )
    with pytest.raises(SplitError, match=r"gate 'g' has a score of shape \(batch, 4\); it must be one number per row"):
        specialize(program_of_model(model, {"exit_0": "y"}))


def test_a_body_that_would_silently_run_is_refused() -> None:
    traced = program_of(ADDED)
    program = specialize(traced)
    assert program.gating is not None
    everything_in_trunk = {name: () for name in program.gating.regions if name != "r"}
    object.__setattr__(program.gating, "regions", everything_in_trunk | {"r": (0,)})
    with pytest.raises(SplitError, match=r"node 'f' \(MatMul\) would run although gate 'g' is shut"):
        prove_spared(traced, program, split(program))


def test_folding_keeps_the_numbers_that_stay_known() -> None:
    program = program_of("n = Sub(one, d)  f = MatMul(x, w)  g = Mul(n, f)  y = Add(x, g)")
    constants = Constants(program)
    shut = constants.filled("d", 0)
    assert shut is not None
    folding = Folding(program, constants, {"d": shut})

    known = folding.of("n")
    assert not isinstance(known, str)
    assert known.is_all(1)
    assert [folding.of(name) for name in ("g", "y")] == ["f", "y"]
    assert {program.nodes[i].op_type for i in folding.live(["y"])} == {"MatMul", "Add"}


@cache
def added() -> Interpreter:
    return Interpreter(program_of(ADDED), open_device("cpu"))


@given(seed=st.integers(0, 2**16), open_=st.lists(st.booleans(), min_size=1, max_size=6))
def test_the_interpreter_forces_decisions_and_lets_them_be(seed: int, open_: list[bool]) -> None:
    interpreter = added()
    x_BF = np.random.default_rng(seed).normal(size=(len(open_), 4)).astype(np.float32)
    inputs = Examples({"x": x_BF})
    is_open_B1 = np.array(open_)[:, None]

    forced, free = interpreter.run(inputs, is_open_B1), interpreter.run(inputs)

    np.testing.assert_allclose(forced.exits[0], np.tanh(x_BF + is_open_B1 * 2 * x_BF), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(free.is_open_BG, free.scores_BG >= 0.5)
    np.testing.assert_allclose(free.exits[0], np.tanh(x_BF + free.is_open_BG * 2 * x_BF), rtol=1e-5, atol=1e-6)
