"""A network that leaves by rules of its own is asked for them, answers by them, and says what they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from offramp_exporter import export
from torch import Tensor, nn


class TwoRules(nn.Module):
    """Leaves where a number is large, then where the label is 2."""

    def forward(self, x: Tensor) -> Tensor:
        if x.amax() > 0.8:
            return x
        if (x * 2).argmax() == 2:
            return x * 2
        return x * 3


SURE, SECOND, LAST = [0.9, 0.1, 0.0, 0.0], [0.1, 0.1, 0.5, 0.0], [0.1, 0.5, 0.1, 0.0]


@pytest.fixture(scope="module")
def native(serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server of that network."""
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("native") / "rules"
    export(TwoRules().eval(), torch.rand(4, 4), folder, name="rules")
    return serve(folder, max_rows=16)


def ask(native: Any, **fields: Any) -> Any:
    return native.client.post("/v1/classify", json={"inputs": [SURE, SECOND, LAST]} | fields)


def left(response: Any) -> list[tuple[int, str]]:
    assert response.status_code == 200, response.text
    return [(one["exit"]["index"], one["exit"]["reason"]) for one in response.json()["predictions"]]


def test_rows_leave_where_the_network_would_have_returned(native: Any) -> None:
    own = [(0, "native"), (1, "native"), (2, "final")]

    assert left(ask(native)) == own, "its own rules are its default policy"
    assert left(ask(native, policy="native")) == own
    assert left(ask(native, policy={"kind": "native"})) == own


def test_an_answer_holds_what_the_rule_compared_and_with_what(native: Any) -> None:
    sure, second, last = ask(native, policy="native").json()["predictions"]

    assert (sure["score"], sure["threshold"]) == (pytest.approx(0.9), 0.8)
    assert (second["score"], second["threshold"]) == (1.0, 0.5)
    assert last["threshold"] is None


@pytest.mark.parametrize(
    ("fields", "exits"),
    [
        ({"policy": "native", "threshold": 0.95}, [2, 1, 2]),
        ({"policy": "native", "threshold": 0.4}, [0, 0, 0]),
        ({"policy": "native", "threshold": [0.95, None]}, [2, 1, 2]),
        ({"policy": {"kind": "native", "threshold": [0.45, None]}}, [0, 0, 0]),
        ({"policy": {"kind": "native", "threshold": [None, None]}}, [0, 1, 2]),
        ({"policy": "native", "threshold": -7.5}, [0, 0, 0]),
        ({"policy": {"kind": "all_of", "of": [{"kind": "native"}, {"kind": "fixed", "exit": 1}]}}, [2, 1, 2]),
    ],
)
def test_a_threshold_moves_the_exits_that_compare_with_a_number(
    native: Any, fields: dict[str, Any], exits: list[int]
) -> None:
    assert [exit_ for exit_, _ in left(ask(native, **fields))] == exits


def test_a_threshold_is_spelled_in_a_query_too(native: Any) -> None:
    headers = {"content-type": "application/json"}
    body = '{"inputs": [[0.1, 0.1, 0.5, 0.0]]}'

    def exit_index(threshold: str) -> int:
        query = {"policy": "native", "threshold": threshold}
        return left(native.client.post("/v1/classify", params=query, content=body, headers=headers))[0][0]

    assert exit_index("0.95") == 1
    assert exit_index("0.45,null") == 0
    assert exit_index("[0.45, null]") == 0


@pytest.mark.parametrize(
    ("fields", "field", "sentence"),
    [
        ({"threshold": [0.9, 0.9]}, "threshold.1", "this exit's rule compares nothing with a constant; write null"),
        ({"threshold": [0.9]}, "threshold", "one number per non-final exit, 2 for this model; got 1"),
        ({"threshold": [0.9, "high"]}, "threshold", "number"),
        ({"patience": 2}, "patience", "policy 'native' has no such parameter"),
    ],
)
def test_what_the_rules_do_not_have_is_refused(native: Any, fields: dict[str, Any], field: str, sentence: str) -> None:
    response = ask(native, policy="native", **fields)

    assert response.status_code == 422
    assert sentence in response.json()["detail"]
    assert response.json()["field"].startswith(field)


def test_a_bundle_without_rules_of_its_own_refuses_them_and_does_not_offer_them(toy: Any) -> None:
    response = toy.client.post("/v1/classify", json={"inputs": [[1.0, 0.0, 0.0, 0.0]], "policy": "native"})

    assert response.status_code == 422
    assert "this model has no exit rules of its own; name another kind" in response.json()["detail"]
    described = toy.client.get("/v1/models/toy").json()
    assert "native" not in described["policies"]
    assert described["predicates"] == []
    assert [exit_["native"] for exit_ in described["exits"]] == [None] * 3


def test_a_model_says_by_which_rules_it_leaves_and_what_its_code_asks(native: Any) -> None:
    described = native.client.get("/v1/models/rules").json()

    assert described["default_policy"] == {"kind": "native", "threshold": None}
    assert "native" in described["policies"]
    first, second, last = (exit_["native"] for exit_ in described["exits"])
    assert (first["threshold"], first["above"], first["is_strict"], first["is_knob"]) == (0.8, True, True, True)
    assert first["sources"][0].startswith("test_native.py:")
    assert second["is_knob"] is False
    assert last is None
    asked, label = described["predicates"]
    assert asked["comparison"] == "score > 0.8"
    assert asked["answers"] == {"exit_0": True, "exit_1": False, "exit_2": False}
    assert label["answers"] == {"exit_0": None, "exit_1": True, "exit_2": False}


def test_what_every_exit_says_does_not_change_with_the_policy(native: Any) -> None:
    prediction = ask(native, policy="native", explain=True).json()["predictions"][1]

    assert [seen["exit"]["index"] for seen in prediction["exits"]] == [0, 1]
    x = np.array(SECOND) * 2
    expected = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    assert prediction["probability"] == pytest.approx(expected.max(), abs=1e-5)


def test_rows_that_left_by_the_networks_own_rules_are_counted_as_such(native: Any) -> None:
    def counted() -> float:
        lines = native.client.get("/metrics").text.splitlines()
        wanted = [line for line in lines if line.startswith("offramp_samples_total") and 'reason="native"' in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in wanted)

    before = counted()
    ask(native, policy="native")

    assert counted() == before + 2
