"""Which returned tensors are exits: the paths a person writes, and what is proposed without a word."""

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offramp_contract.errors import TraceError
from offramp_exporter.depth_order import order_by_depth
from offramp_exporter.exit_paths import ExitPath, find_all, walk
from offramp_exporter.exits import choose_exits, holds_probabilities, is_square_stack
from torch import Tensor

Pair = namedtuple("Pair", ["early", "late"])


@dataclass
class Output:
    logits: list[Tensor]
    note: str = "kept out"


def scores(classes: int = 3) -> Tensor:
    return torch.zeros(2, classes)


def chosen(*given: Any, **more: Any) -> dict[str, str]:
    return {name: str(path) for name, path in choose_exits(*given, **more).paths.items()}


@pytest.mark.parametrize(
    ("returned", "paths"),
    [
        ([scores(), scores()], ["out[0]", "out[1]"]),
        ((scores(), scores()), ["out[0]", "out[1]"]),
        (Pair(scores(), scores()), ["out[0]", "out[1]"]),
        ({"a": scores(), "b": scores()}, ["out['a']", "out['b']"]),
        (Output([scores(), scores()]), ["out.logits[0]", "out.logits[1]"]),
        ([[scores(), torch.zeros(2, 4, 4)], {"x": scores()}, 3], ["out[0][0]", "out[1]['x']"]),
        (scores(), ["out"]),
        ([scores(), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2), torch.zeros(2, 1), None], ["out[0]"]),
        (torch.zeros(4, 2, 3), ["out[0]", "out[1]", "out[2]", "out[3]"]),
        (torch.zeros(2, 4, 3), ["out[:, 0]", "out[:, 1]", "out[:, 2]", "out[:, 3]"]),
        ({"all": torch.zeros(4, 2, 3), "n": 4}, [f"out['all'][{i}]" for i in range(4)]),
        ([scores(), scores().softmax(1), scores()], ["out[0]", "out[2]"]),
        ([scores().softmax(1), scores().softmax(1)], ["out[0]", "out[1]"]),
    ],
)
def test_exits_are_proposed_by_shape_wherever_they_are(returned: object, paths: list[str]) -> None:
    assert list(chosen(returned, 2, None).values()) == paths


@pytest.mark.parametrize(
    ("wanted", "paths"),
    [
        (["[1]['b']"], ["out[1]['b']"]),
        (['out[1]["b"]', "out[0]"], ["out[1]['b']", "out[0]"]),
        (["[1]"], ["out[1]['a']", "out[1]['b']"]),
        (["[1][:]"], ["out[1]['a']", "out[1]['b']"]),
        (["[1][1:]", "[0]"], ["out[1]['b']", "out[0]"]),
        ({"early": "[0]"}, ["out[0]"]),
        (["log(out[0])"], ["log(out[0])"]),
        (["out[1].a"], ["out[1].a"]),
    ],
)
def test_exits_are_found_by_the_path_a_person_writes(wanted: Any, paths: list[str]) -> None:
    returned = [scores(), {"a": scores(), "b": scores(5)}]

    assert list(chosen(returned, 2, wanted).values()) == paths


@pytest.mark.parametrize(
    ("returned", "wanted", "paths"),
    [
        ({"a": scores(), "b": scores()}, ["b"], ["out['b']"]),
        ({"layer 0": scores()}, ["layer 0"], ["out['layer 0']"]),
        ({"output": scores(), "out": scores()}, ["output", "out"], ["out['output']", "out['out']"]),
        (Output([scores(), scores()]), ["logits"], ["out.logits[0]", "out.logits[1]"]),
        (Output([scores(), scores()]), ["out.logits[:]"], ["out.logits[0]", "out.logits[1]"]),
        (Output([scores(), scores()]), ["out.logits[-1]"], ["out.logits[-1]"]),
        (Pair(scores(), scores()), ["out.late"], ["out.late"]),
        (SimpleNamespace(scores=[scores()]), ["out.scores[0]"], ["out.scores[0]"]),
        ([[scores(3), scores(5)], [scores(3), scores(5)]], ["out[:][1]"], ["out[0][1]", "out[1][1]"]),
        ([(scores(), None), (scores(), 3)], ["out[:][0]"], ["out[0][0]", "out[1][0]"]),
        (torch.zeros(3, 2, 3), ["stack(out, dim=0)"], ["out[0]", "out[1]", "out[2]"]),
        (torch.zeros(2, 3, 3), ["stack(out, dim=1)"], ["out[:, 0]", "out[:, 1]", "out[:, 2]"]),
        (torch.zeros(2, 3, 3), ["stack(out, 1)"], ["out[:, 0]", "out[:, 1]", "out[:, 2]"]),
        (torch.zeros(2, 3, 3), ["out[:, 2]", "out[:, 0]"], ["out[:, 2]", "out[:, 0]"]),
        (Output([torch.zeros(2, 2, 3)]), ["stack(out.logits[0], dim=1)"], [f"out.logits[0][:, {i}]" for i in (0, 1)]),
        ([scores(), scores(), scores()], ["final-first"], ["out[1]", "out[2]", "out[0]"]),
        (torch.zeros(3, 2, 3), ["stack(out)", "final-first"], ["out[1]", "out[2]", "out[0]"]),
        ([scores().softmax(1), scores()], ["log(out[:])"], ["log(out[0])", "log(out[1])"]),
    ],
)
def test_every_form_of_output_can_be_named(returned: object, wanted: list[str], paths: list[str]) -> None:
    assert list(chosen(returned, 2, wanted).values()) == paths


def test_an_attribute_of_the_network_is_named_from_self() -> None:
    network = SimpleNamespace(early=SimpleNamespace(scores=scores()), all=[scores(), scores()])

    assert list(chosen(scores(), 2, ["self.early.scores", "self.all[1]", "out"], network=network).values()) == [
        "self.early.scores",
        "self.all[1]",
        "out",
    ]


def test_the_exits_keep_the_number_of_their_place_when_the_final_one_comes_first() -> None:
    assert list(chosen([scores()] * 3, 2, ["final-first"])) == ["exit_1", "exit_2", "exit_0"]


def test_the_logarithm_of_a_probability_that_rounded_to_zero_is_a_number() -> None:
    path = ExitPath(is_probability=True)

    assert torch.isfinite(path.find(torch.tensor([[0.0, 1.0]]), None)).all()


def test_an_unknown_path_is_answered_with_what_there_is() -> None:
    with pytest.raises(TraceError, match=r"exit '\[7\]' is not in what forward returns; it returns out\[0\], out\[1\]"):
        chosen([scores(), scores()], 2, ["[7]"])


@pytest.mark.parametrize("wanted", ["out[", "out[x]", "out..a", "out[1:2:3]", "f(out)"])
def test_a_path_that_cannot_be_read_is_answered_with_the_grammar(wanted: str) -> None:
    with pytest.raises(TraceError, match=r"write out\[0\], out\['early'\]"):
        chosen([scores(), scores()], 2, [wanted])


@pytest.mark.parametrize("wanted", ["out[0][:, 1]", "out[0][0][:, 7]", "out.shape", "self.scores", "out[:][9]"])
def test_a_path_that_leads_to_no_tensor_is_refused(wanted: str) -> None:
    with pytest.raises(TraceError, match=r"is not in what forward returns|cannot be read"):
        find_all(wanted, [[scores()], 3], None)


def test_a_named_tensor_that_holds_no_scores_is_refused_with_its_shape() -> None:
    with pytest.raises(TraceError, match=r"exit 'out\[0\]' is float32 \(2, 3, 4\)"):
        chosen([torch.zeros(2, 3, 4)], 2, ["[0]"])


def test_a_name_stands_for_one_exit() -> None:
    with pytest.raises(TraceError, match=r"exit 'all': 'out' means 2 tensors; name one"):
        chosen([scores(), scores()], 2, {"all": "out"})


def test_nothing_that_fits_is_answered_with_what_was_returned_and_an_adapter() -> None:
    with pytest.raises(TraceError, match=r"out\['map'\]: float32 \(2, 3, 8, 8\)[\s\S]*def forward") as caught:
        chosen({"map": torch.zeros(2, 3, 8, 8)}, 2, None)
    assert "return [logits_0, logits_1, ...]" in caught.value.message


def test_features_beside_logits_are_told_apart_by_the_labels_or_not_at_all() -> None:
    returned = [scores(3), scores(64), scores(3)]

    with pytest.raises(TraceError, match="different widths"):
        chosen(returned, 2, None)
    assert list(chosen(returned, 2, None, num_classes=3).values()) == ["out[0]", "out[2]"]


@pytest.mark.parametrize(
    ("returned", "offer"),
    [
        ([[scores(), scores()], [scores(), scores()]], r"'out\[0\]'.*'out\[:\]\[0\]'"),
        (Pair([scores(), scores()], [scores(), scores()]), r"'out\[0\]'.*'out\[:\]\[0\]'"),
    ],
)
def test_tasks_beside_each_other_are_not_taken_for_exits(returned: object, offer: str) -> None:
    with pytest.raises(TraceError, match=f"2 groups of score-like tensors.*{offer}"):
        chosen(returned, 2, None)


def test_a_stack_of_as_many_exits_as_rows_shows_its_axes_at_another_batch() -> None:
    assert is_square_stack([torch.zeros(3, 3, 5)], 3)
    assert not is_square_stack(torch.zeros(4, 3, 5), 3)


def test_walk_gives_tensors_in_order_and_skips_the_rest() -> None:
    assert [str(path) for path, _ in walk({"n": 3, "t": [None, scores()]})] == ["out['t'][1]"]


KEYS = st.one_of(st.integers(0, 3), st.text("abc xyz,", min_size=1))


@given(st.recursive(st.just(0), lambda held: st.lists(held, min_size=1) | st.dictionaries(KEYS, held, min_size=1)))
def test_every_tensor_is_found_again_by_the_path_that_is_printed(tree: object) -> None:
    def planted(value: object) -> Any:
        if isinstance(value, list):
            return [planted(held) for held in value]
        return {key: planted(held) for key, held in value.items()} if isinstance(value, dict) else scores()

    returned = planted(tree)

    for path, tensor in walk(returned):
        (again,) = find_all(str(path), returned, None)
        assert again.find(returned, None) is tensor


def test_rows_of_probabilities_lie_between_0_and_1_and_sum_to_1() -> None:
    assert holds_probabilities(torch.randn(3, 4).softmax(1))
    assert not holds_probabilities(torch.randn(3, 4).log_softmax(1))
    assert not holds_probabilities(torch.randn(3, 4).sigmoid())
    assert not holds_probabilities(torch.tensor([[2.0, -1.0]]))


@pytest.mark.parametrize(
    ("needs", "order"),
    [
        # a chain 1, 2, 3 with a head (10 and up) behind each of its blocks
        ([{1, 10}, {1, 2, 11}, {1, 2, 3, 12}], [0, 1, 2]),
        ([{1, 2, 3, 12}, {1, 10}, {1, 2, 11}], [1, 2, 0]),
        ([{1, 2, 3, 12}, {1, 2, 11}, {1, 10}], [2, 1, 0]),
        ([{1, 2, 11}, {1, 10}, {1, 2, 3, 12}], [1, 0, 2]),
        # of two, only the layers of their own tell
        ([{1, 2, 3, 4, 12}, {1, 10}], [1, 0]),
        ([{1, 10, 11}, {1, 2}], [0, 1]),
        # two streams that lie in none of each other
        ([{1, 2, 10}, {5, 11}, {1, 2, 5, 12}], [0, 1, 2]),
    ],
)
def test_the_order_of_depth_is_read_off_the_dependencies(needs: list[set[int]], order: list[int]) -> None:
    by_name = {str(index): nodes for index, nodes in enumerate(needs)}

    assert order_by_depth(by_name, set(range(20))) == [str(index) for index in order]
