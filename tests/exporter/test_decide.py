import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from offramp_contract.manifest import Exit
from offramp_contract.statistics import Decision, decision_of_logits, decision_width
from offramp_exporter.decide import add_decision
from offramp_runtime import open_device
from onnx import TensorProto, helper

DEVICE = open_device("cpu", threads=1)
SESSIONS: dict[int, object] = {}


def decide(logits_BC: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Run the graph that `add_decision` writes."""
    num_classes = logits_BC.shape[1]
    if num_classes not in SESSIONS:
        exit_ = Exit(name="e", stage=0, logits="z", decision="d", temperature="t", num_classes=num_classes)
        kind = ["batch", num_classes]
        graph = helper.make_graph(
            [helper.make_node("Identity", ["x"], ["z"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, kind)],
            [helper.make_tensor_value_info("z", TensorProto.FLOAT, kind)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        add_decision(model, exit_)
        SESSIONS[num_classes] = DEVICE.load(model.SerializeToString(), "decision")
    feeds = {"x": logits_BC, "t": np.array(temperature, dtype=np.float32)}
    _, (decision_BD,) = DEVICE.run(SESSIONS[num_classes], feeds, [], ["d"])  # type: ignore[arg-type]
    return decision_BD


def logits(rows: int, classes: int, bound: float) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float32, (rows, classes), elements=st.floats(-bound, bound, width=32))


@given(st.sampled_from([2, 3, 5, 6, 10]).flatmap(lambda c: logits(3, c, 2.0**9)), st.sampled_from([0.5, 1.0, 2.5]))
@example(np.array([[0.0, 0.0, 0.0], [80.0, -80.0, 0.0], [0.0, 120.0, 120.0]], dtype=np.float32), 1.0)
def test_the_graph_computes_the_contracts_statistics(logits_BC: np.ndarray, temperature: float) -> None:
    actual_BD, oracle_BD = decide(logits_BC, temperature), decision_of_logits(logits_BC, temperature)

    assert actual_BD.shape == (3, decision_width(logits_BC.shape[1]))
    # The oracle sums in float64, which ends at log-odds of about 745.
    within = oracle_BD[:, 0] < 700
    np.testing.assert_allclose(actual_BD[within, 0], oracle_BD[within, 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(actual_BD[:, 1:], oracle_BD[:, 1:], rtol=1e-5, atol=1e-5)


def test_ties_go_to_the_lowest_class() -> None:
    decision = Decision(decide(np.array([[1.0, 7.0, 7.0, 0.0, 7.0, 7.0]], dtype=np.float32)))

    assert decision.top_class_BK.tolist() == [[1, 2, 4, 5, 0]]
    assert decision.margin_B.tolist() == [0.0]


def test_log_odds_still_rise_where_probabilities_round_to_one() -> None:
    logits_BC = np.array([[20.0, 0.0], [40.0, 0.0], [200.0, 0.0], [2000.0, 0.0]], dtype=np.float32)

    decision = Decision(decide(logits_BC))

    assert (decision.top_probability_BK[1:, 0] == 1.0).all()
    np.testing.assert_allclose(decision.log_odds_B, [20.0, 40.0, 200.0, 2000.0], rtol=1e-6)


def test_masked_classes_are_impossible_not_an_error() -> None:
    logits_BC = np.array([[1.0, 2.0, -np.inf], [3.0, -np.inf, -np.inf]], dtype=np.float32)

    decision = Decision(decide(logits_BC))

    assert decision.is_finite_B.all()
    np.testing.assert_allclose(decision.log_odds_B, [1.0, np.inf], rtol=1e-6)
    assert decision.entropy_B[1] == 0.0


@pytest.mark.parametrize("place", range(7))
def test_a_nan_anywhere_makes_its_row_undefined_and_no_other(place: int) -> None:
    logits_BC = np.tile(np.arange(7, dtype=np.float32), (3, 1))
    logits_BC[1, place] = np.nan

    assert Decision(decide(logits_BC)).is_finite_B.tolist() == [True, False, True]


@given(arrays(np.float32, (2, 4), elements=st.sampled_from([-np.inf, np.inf, np.nan, -1e30, -3.0, 0.0, 2.5, 1e30])))
def test_the_graph_and_the_oracle_agree_on_what_is_no_number(logits_BC: np.ndarray) -> None:
    actual, oracle = Decision(decide(logits_BC)), Decision(decision_of_logits(logits_BC))

    assert actual.is_finite_B.tolist() == oracle.is_finite_B.tolist()
    defined = oracle.is_finite_B
    np.testing.assert_allclose(actual.packed_BD[defined, 1:], oracle.packed_BD[defined, 1:], rtol=1e-5, atol=1e-5)


def test_entropy_stays_within_its_bounds() -> None:
    for num_classes in (2, 3, 7, 10, 1000):
        flat = Decision(decide(np.full((1, num_classes), 3.3, dtype=np.float32))).entropy_B
        sure = Decision(decide(np.eye(1, num_classes, dtype=np.float32) * 1e4)).entropy_B
        assert flat[0] == pytest.approx(1.0, abs=1e-6)
        assert flat[0] <= 1.0
        assert sure[0] == 0.0


def test_a_temperature_softens_what_it_divides() -> None:
    logits_BC = np.array([[4.0, 0.0]], dtype=np.float32)

    assert decide(logits_BC, 2.0)[0, 0] == pytest.approx(2.0)
    assert decide(logits_BC, 0.5)[0, 0] == pytest.approx(8.0)
