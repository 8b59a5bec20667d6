"""What a person, or nobody, writes for a path: read as meant, or refused in words, and always soon."""

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offramp_contract.errors import TraceError
from offramp_exporter.exit_paths import parse_exits, walk
from offramp_exporter.exits import choose_exits
from torch import Tensor


def scores() -> Tensor:
    return torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("text", "exits"),
    [
        ("out[0], out[1]", ["out[0]", "out[1]"]),
        ("early=out[0],late=out[1]", {"early": "out[0]", "late": "out[1]"}),
        ("stack(out, dim=1)", ["stack(out, dim=1)"]),
        ("stack(out, dim=1),final-first", ["stack(out, dim=1)", "final-first"]),
        ("a=stack(out, dim=0)", {"a": "stack(out, dim=0)"}),
        ("out['a,b'],out[:, 1]", ["out['a,b']", "out[:, 1]"]),
        ("/model/fc/Gemm_output_0,final", ["/model/fc/Gemm_output_0", "final"]),
    ],
)
def test_a_command_line_is_cut_at_the_commas_that_stand_in_no_bracket(text: str, exits: object) -> None:
    assert parse_exits(text) == exits


@pytest.mark.parametrize("text", ["early=out[0],early=out[1]", "=out[0]", "late=out[1],=out[0]"])
def test_a_command_line_that_names_two_exits_alike_loses_none(text: str) -> None:
    with pytest.raises(TraceError, match="must name each exit, and each differently"):
        parse_exits(text)


def test_a_command_line_that_names_nothing_is_refused() -> None:
    with pytest.raises(TraceError, match="nothing is named"):
        parse_exits(" , ")


@pytest.mark.parametrize("wanted", ["self.__class__", "self.heads.__dict__['x']", "out.__init__.__globals__", "\0"])
def test_a_path_does_not_lead_into_python_itself(wanted: str) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        choose_exits([scores()], 2, [wanted], network=SimpleNamespace(heads=scores()))


@pytest.mark.parametrize(
    "wanted",
    ["log(" * 900 + "out" + ")" * 900, "out" + "[0]" * 9000, f"out[{'9' * 5000}]", "stack(" + ", " * 9000 + ")"],
)
def test_a_path_that_nobody_writes_is_refused_unread_and_not_repeated(wanted: str) -> None:
    with pytest.raises(TraceError, match="is longer than 1000 letters") as caught:
        choose_exits([scores()], 2, [wanted])
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("wanted", ["out[:]", "out[:][:][:]", "stack(out, dim=1)"])
def test_a_path_that_means_more_than_a_network_has_exits_is_refused(wanted: str) -> None:
    with pytest.raises(TraceError, match="means over 1024 tensors"):
        choose_exits(torch.zeros(1100, 1100, 2), 2, [wanted])


def test_more_exits_than_a_network_has_are_not_proposed() -> None:
    with pytest.raises(TraceError, match="there are 1100; name 1 to 1024"):
        choose_exits(torch.zeros(1100, 2, 3), 2, None)


@pytest.mark.parametrize("wanted", [f"out[{10**30}]", f"out[0][:, {10**30}]", f"out[0][{10**30}]", "out[0].T.mT[0]"])
def test_a_number_that_no_tensor_has_leads_nowhere(wanted: str) -> None:
    with pytest.raises(TraceError, match=r"is not in what forward returns|an exit's logits are"):
        choose_exits([scores(), scores()], 2, [wanted])


def test_axes_are_those_of_tensors() -> None:
    with pytest.raises(TraceError, match="is not in what forward returns"):
        choose_exits([scores(), scores()], 2, ["stack(out, dim=1)"])


@given(st.text("outselfstacklogdim[](){}.,:=-' \"_0129", max_size=60))
def test_any_text_is_read_or_refused_in_words(wanted: str) -> None:
    returned = {"out": [scores(), scores()], "o": (scores(), {"s": torch.zeros(2, 2, 3)})}
    for given_as in ([wanted], {"early": wanted}):
        with suppress(TraceError):
            choose_exits(returned, 2, given_as, network=SimpleNamespace(s=scores()))
    with suppress(TraceError):
        parse_exits(wanted)


def test_what_holds_itself_is_walked_once() -> None:
    returned: list[Any] = [scores()]
    returned += [returned, {"again": returned}, scores()]
    deep: Any = scores()
    for _ in range(5000):
        deep = [deep]

    assert [str(path) for path, _ in walk(returned)] == ["out[0]", "out[3]"]
    assert not list(walk(deep))
