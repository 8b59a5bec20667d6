"""`precision="fp16"`: weights and values in float16, decisions in float32, proved against the network as it is."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from early_networks import MaxSoftmax
from early_oracle import images
from gated_networks import MulAdd
from offramp_contract.errors import ParityError
from offramp_contract.manifest import Manifest
from offramp_contract.parts import Proof
from offramp_contract.statistics import decision_of_logits
from offramp_exporter import export, export_onnx
from offramp_exporter.half import half_program
from offramp_exporter.merge import merge_exits
from offramp_exporter.program import Program
from offramp_exporter.rounding import HALF, SINGLE
from offramp_exporter.trace import trace
from offramp_runtime import Bundle, StageExecutor, open_device, run_all_exits, run_gated
from offramp_runtime.device import CpuDevice, OrtValueDevice
from offramp_runtime.providers import on_cpu
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

TOLERANCE = {"rtol": HALF.tolerance, "atol": HALF.tolerance}


class TwoExits(nn.Module):
    """Two exits; what is ranked on the way is an operator that the converter keeps in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.deep = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8 * 16, 8)
        self.early, self.late = nn.Linear(8, 3), nn.Linear(8 + 2, 3)

    def forward(self, image: Tensor) -> list[Tensor]:
        map_ = torch.relu(self.body(image))
        hidden = torch.tanh(self.deep(map_.flatten(1)))
        best = torch.topk(hidden, 2).values
        return [self.early(map_.mean((2, 3))), self.late(torch.cat([hidden, best], 1))]


class TooLarge(nn.Module):
    """Float16 ends at 65504."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.linear(x), self.linear(x * 1e4 * 1e4) / 1e8]


@pytest.fixture(scope="module")
def network() -> TwoExits:
    torch.manual_seed(0)
    return TwoExits().eval()


@pytest.fixture(scope="module")
def bundle(network: TwoExits, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.set_num_threads(1)
    return export(network, torch.randn(2, 1, 4, 4), tmp_path_factory.mktemp("half") / "bundle", precision="fp16")


def weights(bundle: Bundle) -> list[TensorProto]:
    return [tensor for graph in bundle.graphs for tensor in ModelProto.FromString(graph).graph.initializer]


def test_weights_and_carries_are_float16_and_what_meets_the_host_is_float32(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.precision == "fp16"
    assert [tensor.dtype for tensor in manifest.inputs] == ["float32"]
    assert {tensor.dtype for tensor in manifest.carries} == {"float16"}
    large = [tensor.data_type for tensor in weights(bundle) if numpy_helper.to_array(tensor).size > 8]
    assert large
    assert set(large) == {TensorProto.FLOAT16}
    for stage, graph in zip(manifest.stages, bundle.graphs, strict=True):
        outputs = {one.name: one.type.tensor_type.elem_type for one in ModelProto.FromString(graph).graph.output}
        assert stage.exit is not None
        exit_ = manifest.exits[stage.exit]
        assert {outputs[exit_.logits], outputs[exit_.decision]} == {TensorProto.FLOAT}


@pytest.mark.parametrize("kind", ["arrays", "ort_values"])
def test_its_answers_are_the_networks_within_the_tolerance_that_the_manifest_states(
    network: TwoExits, bundle: Bundle, kind: str
) -> None:
    proof = bundle.manifest.provenance.proof
    assert proof is not None
    assert proof.tolerance == HALF.tolerance
    device = CpuDevice(1) if kind == "arrays" else OrtValueDevice(on_cpu(), 1)
    image = torch.randn(9, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = [scores_BC.numpy() for scores_BC in network(image)]
    answers = run_all_exits(StageExecutor(bundle, device), {"image": image.numpy()})
    for (logits_BC, decision_BD), expected_BC in zip(answers, expected, strict=True):
        np.testing.assert_allclose(logits_BC, expected_BC, **TOLERANCE)
        assert not np.array_equal(logits_BC, expected_BC)
        np.testing.assert_allclose(decision_BD, decision_of_logits(logits_BC), rtol=1e-4, atol=1e-4)


def test_a_network_that_float16_cannot_hold_is_refused_in_words_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"allowed are 0\.02 .*; float16 may be too coarse for it: export it in fp32"):
        export(TooLarge().eval(), torch.randn(2, 4), tmp_path / "bundle", precision="fp16")
    assert not (tmp_path / "bundle").exists()


def test_the_gates_of_a_network_decide_in_float32_and_what_they_spare_is_spared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = MulAdd().eval()
    example = torch.randn(4, *MulAdd.inputs)
    single, half = (
        export(network, example, tmp_path / precision, precision=precision) for precision in ("fp32", "fp16")
    )
    assert [stage.gates for stage in half.manifest.stages] == [stage.gates for stage in single.manifest.stages]
    assert [stage.flops for stage in half.manifest.stages] == [stage.flops for stage in single.manifest.stages]
    (name,) = [tensor.name for tensor in half.manifest.inputs]
    x = torch.randn(8, *MulAdd.inputs, generator=torch.Generator().manual_seed(3)).numpy()
    exact, rounded = (run_gated(StageExecutor(one, open_device("cpu", 1)), {name: x}) for one in (single, half))
    assert rounded.scores_BG.dtype == np.float32
    np.testing.assert_allclose(rounded.scores_BG, exact.scores_BG, **TOLERANCE)
    same_B = (rounded.is_open_BG == exact.is_open_BG).all(axis=1)
    assert same_B.any()
    np.testing.assert_allclose(rounded.exits[-1][0][same_B], exact.exits[-1][0][same_B], **TOLERANCE)


def test_a_network_that_returns_early_keeps_its_own_rules(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bundle = export(MaxSoftmax().eval(), images()[:4], tmp_path / "bundle", precision="fp16")
    assert bundle.manifest.native is not None
    assert bundle.manifest.provenance.proof is not None
    assert bundle.manifest.provenance.proof.unreached == ()


def test_an_onnx_file_is_written_in_float16_too_and_its_stages_can_be_merged(tmp_path: Path) -> None:
    model = helper.make_model(
        onnx.parser.parse_graph(
            "chain (float[N, 4] image) => (float[N, 3] out) "
            "{ hidden = Tanh(image)  scores = MatMul(hidden, w)  deep = Tanh(hidden)  out = MatMul(deep, w) }"
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save(model, tmp_path / "chain.onnx")
    bundle = export_onnx(tmp_path / "chain.onnx", ["scores", "out"], tmp_path / "bundle", precision="fp16")
    assert bundle.manifest.precision == "fp16"
    merged = merge_exits(bundle, [0], tmp_path / "merged")
    assert merged.manifest.precision == "fp16"
    image = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    ((logits_BC, _),) = run_all_exits(StageExecutor(merged, CpuDevice(1)), {"image": image})
    np.testing.assert_allclose(logits_BC, np.tanh(np.tanh(image)) @ weight, **TOLERANCE)


def test_a_program_is_converted_once_and_all_that_it_reads_comes_before(network: TwoExits) -> None:
    program = trace(network, torch.randn(2, 1, 4, 4)).program
    half = half_program(program)
    assert half_program(half) is half
    assert list(half.exits) == list(program.exits)
    assert_sorted(half)


def assert_sorted(program: Program) -> None:
    known = {*program.initializers, *program.inputs, "offramp.batch_size", ""}
    for node in program.nodes:
        assert set(node.input) <= known
        known.update(node.output)


def test_a_bundle_that_says_no_tolerance_keeps_its_digest(bundle: Bundle) -> None:
    manifest = bundle.manifest
    silent = manifest.provenance.model_copy(update={"proof": Proof(num_inputs=3)})
    written = manifest.model_copy(update={"provenance": silent}).to_bytes()
    assert b"tolerance" not in written
    assert Manifest.from_bytes(written).to_bytes() == written
    assert b'"tolerance": 0.02' in manifest.to_bytes()
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert SINGLE.tolerance < HALF.tolerance
