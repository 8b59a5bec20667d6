"""What `explain` says of a network is what the bundle then holds, and nothing is written for it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from carrying_networks import Blocks
from early_networks import Checked, ConfidentAndClear, MaxSoftmax, Trunk
from offramp_contract.errors import TraceError
from offramp_contract.manifest import Manifest
from offramp_contract.policy_spec import ConfidenceSpec, EntropySpec, NativeSpec
from offramp_exporter import Explanation, explain, explain_onnx, export, export_onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


IMAGES = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def assert_says_what_the_bundle_holds(explained: Explanation, manifest: Manifest) -> None:
    assert explained.inputs == manifest.inputs
    assert [exit_.name for exit_ in explained.exits] == [exit_.name for exit_ in manifest.exits]
    assert [exit_.num_classes for exit_ in explained.exits] == [exit_.num_classes for exit_ in manifest.exits]
    assert [exit_.flops for exit_ in explained.exits] == [stage.flops for stage in manifest.stages]
    assert [exit_.carry_bytes for exit_ in explained.exits] == [stage.carry_bytes for stage in manifest.stages]
    assert [exit_.depth for exit_ in explained.exits] == pytest.approx(manifest.exit_depths)
    carries = {tensor.name: tensor for tensor in (*manifest.carries, *manifest.inputs)}
    for exit_ in explained.exits:
        assert all(carries[tensor.name] == tensor for tensor in exit_.carries)
        assert exit_.carry_bytes == sum(int(np.prod(t.shape)) * np.dtype(t.dtype).itemsize for t in exit_.carries)
    assert explained.default_policy == manifest.default_policy
    assert (explained.batches.smallest, explained.batches.largest) == (manifest.min_batch, manifest.max_batch)


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> tuple[Explanation, Manifest]:
    torch.set_num_threads(1)
    network, out = MaxSoftmax().eval(), tmp_path_factory.mktemp("explained") / "early"
    return explain(network, IMAGES), export(network, IMAGES, out).manifest


def test_a_network_that_returns_early_is_explained_as_it_is_exported(early: tuple[Explanation, Manifest]) -> None:
    explained, manifest = early

    assert_says_what_the_bundle_holds(explained, manifest)
    assert explained.default_policy == NativeSpec()
    assert [exit_.path for exit_ in explained.exits] == ["out[0]"] * 3


def test_the_networks_own_rules_stand_at_their_exits_with_their_line(early: tuple[Explanation, Manifest]) -> None:
    explained, manifest = early

    first, second, final = explained.exits
    assert first.native == second.native
    assert first.native is not None
    assert first.native.startswith("where score > 0.6 at early_networks.py:")
    assert "(if torch.max(F.softmax(out, dim=1)) > self.threshold:)" in first.native
    assert final.native is None
    assert manifest.exits[0].native is not None
    assert manifest.exits[0].native.sources[0] in first.native


def test_every_question_is_named_with_where_each_answer_leads(early: tuple[Explanation, Manifest]) -> None:
    explained, manifest = early

    assert len(explained.answers) == len(manifest.predicates) == 2
    at_first, at_second = explained.answers
    assert at_first.startswith(f"{manifest.predicates[0].source}, score > 0.6: ")
    assert at_first.endswith("yes on the way to exit_0; no on the way to exit_1, exit_2")
    assert at_second.endswith("yes on the way to exit_1; no on the way to exit_2")
    assert explained.notes == ()


def test_a_rule_that_is_no_single_comparison_is_told_by_its_lines() -> None:
    explained = explain(ConfidentAndClear().eval(), IMAGES)

    rule = explained.exits[0].native
    assert rule is not None
    assert rule.startswith("where the code says so at early_networks.py:")
    assert len([answer for answer in explained.answers if ", score > 0.4: " in answer]) == 2


def test_a_check_is_told_with_the_answer_on_which_the_network_raises() -> None:
    explained = explain(Checked().eval(), IMAGES)

    finite = next(answer for answer in explained.answers if "isfinite" in answer)
    assert finite.endswith("yes on the way to exit_0, exit_1; no raises, where a bundle answers")
    assert not any("raises" in note for note in explained.notes)


class OnlyChecked(Trunk):
    """Raises on a question, and returns every exit otherwise."""

    def forward(self, x: Tensor) -> list[Tensor]:
        if torch.isnan(x).any():
            raise ValueError("not a number")
        first = self.block(0, x)
        return [self.head(0, first), self.head(1, self.block(1, first))]


def test_a_check_in_a_network_that_returns_every_exit_is_told_and_kept(tmp_path: Path) -> None:
    explained = explain(OnlyChecked().eval(), IMAGES)
    bundle = export(OnlyChecked().eval(), IMAGES, tmp_path / "checked")

    (answer,) = explained.answers
    assert answer.endswith("(if torch.isnan(x).any():): yes raises, where a bundle answers; no goes on")
    assert all(exit_.native is None for exit_ in explained.exits)
    assert_says_what_the_bundle_holds(explained, bundle.manifest)
    (predicate,) = bundle.manifest.predicates
    assert predicate.raises_on is True
    assert predicate.source in answer


def test_a_plain_network_is_explained_as_it_is_exported(tmp_path: Path) -> None:
    network, x = Blocks().eval(), torch.randn(2, 6)

    explained = explain(network, x, default_policy=EntropySpec(threshold=0.3))
    bundle = export(network, x, tmp_path / "plain", default_policy=EntropySpec(threshold=0.3))

    assert_says_what_the_bundle_holds(explained, bundle.manifest)
    assert explained.source == bundle.manifest.provenance.source
    assert [exit_.path for exit_ in explained.exits] == ["out[0]", "out[1]", "out[2]"]
    assert [len(exit_.carries) for exit_ in explained.exits] == [1, 1, 0]
    assert [exit_.carry_bytes for exit_ in explained.exits] == [24, 24, 0]
    assert sum(exit_.share for exit_ in explained.exits) == pytest.approx(1)
    assert explained.full_flops == sum(stage.flops for stage in bundle.manifest.stages)
    assert explained.answers == ()


class FinalFirst(Blocks):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)[::-1]


def test_exits_are_told_by_where_they_are_in_the_output_and_what_was_made_of_it() -> None:
    explained = explain(FinalFirst().eval(), torch.randn(2, 6))

    assert [exit_.path for exit_ in explained.exits] == ["out[2]", "out[1]", "out[0]"]
    assert [exit_.name for exit_ in explained.exits] == ["exit_2", "exit_1", "exit_0"]
    assert any("put the exits in the order of their depth" in note for note in explained.notes)


def two_exits(path: Path) -> Path:
    generator = np.random.default_rng(0)
    shapes = {"w_early": (6, 3), "w_body": (6, 8), "w_late": (8, 3)}
    weights = [
        numpy_helper.from_array(generator.normal(size=shape).astype(np.float32), name) for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w_early"], ["early"]),
        helper.make_node("MatMul", ["x", "w_body"], ["body"]),
        helper.make_node("Relu", ["body"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "w_late"], ["late"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("early", "late")]
    graph = helper.make_graph(nodes, "two", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_an_onnx_file_is_explained_as_it_is_exported(tmp_path: Path) -> None:
    path = two_exits(tmp_path / "two.onnx")

    explained = explain_onnx(path, {"quick": "early", "full": "late"})
    bundle = export_onnx(path, {"quick": "early", "full": "late"}, tmp_path / "two")

    assert_says_what_the_bundle_holds(explained, bundle.manifest)
    assert explained.source == "two.onnx"
    assert {exit_.name: exit_.path for exit_ in explained.exits} == {"quick": "early", "full": "late"}
    assert [exit_.carries[0].name for exit_ in explained.exits[:1]] == ["x"]
    assert explained.default_policy == ConfidenceSpec()


class Tied(nn.Module):
    """One cell for every exit."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(40, 40), nn.Linear(40, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        exits = []
        for _ in range(3):
            x = torch.tanh(self.cell(x))
            exits.append(self.head(x))
        return exits


def test_weights_that_several_stages_read_are_counted_once() -> None:
    assert explain(Tied().eval(), torch.randn(2, 40)).shared_bytes == 40 * 40 * 4


def test_nothing_is_written_and_the_network_keeps_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network = Blocks().train()

    explain(network, torch.randn(2, 6))

    assert list(tmp_path.iterdir()) == []
    assert network.training


class Unclear(Blocks):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"features": x, "late": super().forward(x)[2]}


def test_what_cannot_be_exported_cannot_be_explained_either() -> None:
    with pytest.raises(TraceError):
        explain(Unclear().eval(), torch.randn(2, 6))
