"""Deep networks: many boundaries, weights that exits share, and what the stage files then weigh."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from offramp_exporter import export
from offramp_runtime import Bundle, StageExecutor, open_device, run_all_exits
from onnx import TensorProto
from torch import Tensor, nn

BENCHMARK = Path(__file__).parents[2] / "exporter/benchmarks/deep_network.py"
MOST = 1.05
"""What all stage files may weigh together, as a share of the one graph that computes the same exits."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def deep() -> ModuleType:
    """The network that the benchmark measures."""
    spec = importlib.util.spec_from_file_location("deep_network", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def answers(bundle: Bundle, image: Tensor) -> list[np.ndarray]:
    executor = StageExecutor(bundle, open_device("cpu", threads=1))
    return [logits for logits, _ in run_all_exits(executor, {bundle.manifest.inputs[0].name: image.numpy()})]


def assert_weighs_no_more_than_one_graph(deep: ModuleType, network: nn.Module, out: Path) -> Bundle:
    image = torch.randn(2, 3, 8, 8)
    bundle = export(network, image, out)
    _, whole = deep.single_graph_bytes(network, image)
    assert deep.stage_bytes(out) <= MOST * whole
    with torch.no_grad():
        for actual, expected in zip(answers(bundle, image), network(image), strict=True):
            np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-4, atol=1e-4)
    return bundle


def test_six_stage_files_weigh_no_more_than_one_graph_and_five_percent(deep: ModuleType, tmp_path: Path) -> None:
    network = deep.DeepNetwork(2).eval()

    bundle = assert_weighs_no_more_than_one_graph(deep, network, tmp_path / "deep")

    assert len(bundle.manifest.stages) == 6
    assert bundle.manifest.shared_weights is None


@pytest.mark.slow
@pytest.mark.parametrize("is_tied", [False, True], ids=["own heads", "tied heads"])
def test_as_deep_as_resnet_110_with_an_exit_behind_every_block(deep: ModuleType, tmp_path: Path, is_tied: bool) -> None:
    network = deep.DeepNetwork(18, is_tied=is_tied, num_classes=100).eval()

    bundle = assert_weighs_no_more_than_one_graph(deep, network, tmp_path / "deep")

    assert len(bundle.manifest.stages) == 54
    assert (bundle.manifest.shared_weights is not None) == is_tied


class Tied(nn.Module):
    """One cell and one head for every exit, as a recurrent network over depth has them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Linear(16, 128), nn.Linear(128, 128), nn.Linear(128, 40)

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden, exits = self.embed(x).unsqueeze(1), []
        for _ in range(5):
            hidden = torch.tanh(self.cell(hidden))
            exits.append(self.head(hidden).squeeze(1))
        return exits


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tied, Bundle, Path]:
    torch.manual_seed(1)
    network, out = Tied().eval(), tmp_path_factory.mktemp("tied") / "tied"
    return network, export(network, torch.randn(2, 16), out), out


def test_weights_that_several_stages_read_are_stored_once(tied: tuple[Tied, Bundle, Path], deep: ModuleType) -> None:
    network, bundle, out = tied
    shared = bundle.manifest.shared_weights
    assert shared is not None
    assert sorted(tensor.shape for tensor in shared.tensors) == [(128, 40), (128, 128)]
    assert (out / "stages/weights.bin").stat().st_size == 4 * (128 * 40 + 128 * 128)
    held = [tensor for i in range(5) for tensor in onnx.load_from_string(bundle.graph(i)).graph.initializer]
    large = [tensor for tensor in held if np.prod(tensor.dims) * 4 >= 4096]
    assert len(large) == 1 + 5 * 2
    assert all(t.data_location == TensorProto.EXTERNAL for t in large if t.name != "network.embed.weight")
    _, whole = deep.single_graph_bytes(network, torch.randn(2, 16))
    # 40 classes make the decision rules weigh more than 5 % of so small a network, whatever is stored once
    assert deep.stage_bytes(out) - 5 * 4200 <= MOST * whole


def test_a_network_with_tied_weights_answers_as_it_does_in_torch(tied: tuple[Tied, Bundle, Path]) -> None:
    network, bundle, _ = tied
    x = torch.randn(7, 16)
    with torch.no_grad():
        for actual, expected in zip(answers(bundle, x), network(x), strict=True):
            np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_the_stage_files_are_plain_onnx_for_any_other_tool(tied: tuple[Tied, Bundle, Path]) -> None:
    _, _, out = tied
    for path in sorted((out / "stages").glob("*.onnx")):
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path)
        assert not any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer)


def test_the_same_network_gives_the_same_bytes(tied: tuple[Tied, Bundle, Path], tmp_path: Path) -> None:
    network, bundle, _ = tied
    again = export(network, torch.from_numpy(np.zeros((2, 16), np.float32)), tmp_path / "again")
    assert again.manifest.shared_weights == bundle.manifest.shared_weights
    assert again.graphs == bundle.graphs
