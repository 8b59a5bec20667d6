"""From a torch network to a bundle that the runtime opens, and that answers as the network does.

`export` proves parity itself; these tests look at what crosses the boundaries and prove it a second time from outside.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from offramp_contract.errors import ExportError, ParityError, TraceError
from offramp_contract.manifest import File, ImagePreprocessing, TextPreprocessing
from offramp_contract.policy_spec import EntropySpec
from offramp_exporter import StagedModule, export
from offramp_runtime import Bundle, StageExecutor, open_bundle, open_device, run_all_exits
from torch import Tensor, nn
from torch.nn import functional as F

DEVICE = open_device("cpu", threads=1)


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def answers(bundle: Bundle, **inputs: Tensor) -> list[np.ndarray]:
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    return [logits for logits, _ in run_all_exits(StageExecutor(bundle, DEVICE), arrays)]


def assert_equal_to(bundle: Bundle, expected: list[Tensor], **inputs: Tensor) -> None:
    for actual, wanted in zip(answers(bundle, **inputs), expected, strict=True):
        np.testing.assert_allclose(actual, wanted.detach().numpy(), rtol=1e-4, atol=1e-4)


def crossing(bundle: Bundle) -> list[list[tuple[int, ...]]]:
    """Give the row shapes that each stage reads, sorted."""
    tensors = bundle.manifest.tensors
    return [sorted(tensors[name].shape for name in stage.inputs) for stage in bundle.manifest.stages]


class Chain(nn.Module):
    """Three convolutions, a head behind each; the heads flatten with the batch size written out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(c, 4, 3, padding=1) for c in (1, 4, 4)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(3)])
        self.heads = nn.ModuleList([nn.Linear(4 * 36, 5) for _ in range(3)])

    def features(self, x: Tensor) -> list[Tensor]:
        maps = []
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = norm(block(x)).relu()
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> list[Tensor]:
        # every head is computed after all blocks
        return [head(f.view(f.size(0), -1)) for head, f in zip(self.heads, self.features(x), strict=True)]


def test_a_chain_whose_heads_come_after_all_blocks_becomes_one_stage_per_exit(tmp_path: Path) -> None:
    network = Chain().train()

    bundle = export(network, torch.randn(1, 1, 6, 6), tmp_path / "chain")

    manifest = bundle.manifest
    assert crossing(bundle) == [[(1, 6, 6)], [(4, 6, 6)], [(4, 6, 6)]]
    assert [stage.name for stage in manifest.stages] == ["stage_0", "stage_1", "stage_2"]
    assert [exit_.name for exit_ in manifest.exits] == ["exit_0", "exit_1", "exit_2"]
    assert [stage.carry_bytes for stage in manifest.stages] == [576, 576, 0]
    # a convolution and its bias (batch norm folded in), ReLU, the head
    assert manifest.stages[1].flops == 4 * 36 * (2 * 36 + 1) + 4 * 36 + 5 * (2 * 144 + 1)
    assert network.training, "export leaves the module in the mode it was in"
    x = torch.randn(5, 1, 6, 6)
    assert_equal_to(bundle, network.eval()(x), x=x)


def test_stage_graphs_carry_no_traces_of_the_machine_that_wrote_them(tmp_path: Path) -> None:
    bundle = export(Chain(), torch.randn(1, 1, 6, 6), tmp_path / "chain")

    for index in range(3):
        model = onnx.load_from_string(bundle.graph(index))
        onnx.checker.check_model(model, full_check=True)
        assert not model.metadata_props
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
        assert str(Path(__file__).parent).encode() not in bundle.graph(index)


def test_rows_that_stay_answer_as_if_the_others_had_stayed_too(tmp_path: Path) -> None:
    bundle = export(Chain(), torch.randn(1, 1, 6, 6), tmp_path / "chain")
    executor = StageExecutor(bundle, DEVICE)
    x = torch.randn(8, 1, 6, 6).numpy()
    full = run_all_exits(executor, {"x": x})
    survivors = [1, 2, 6]

    first = executor.run(0, {"x": x})
    second = executor.run(1, {name: tensor[survivors] for name, tensor in first.carries.items()})

    np.testing.assert_allclose(second.logits, full[1][0][survivors], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(second.decision_BD, full[1][1][survivors], rtol=1e-4, atol=1e-4)


class Dense(nn.Module):
    """Every block reads all earlier features, and the last the input again."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6 + 4 * k, 4) for k in range(3)])
        self.heads = nn.ModuleList([nn.Linear(4, 3) for _ in range(3)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features, exits = [x], []
        for block, head in zip(self.blocks, self.heads, strict=True):
            features.append(block(torch.cat(features, dim=1)).relu())
            exits.append(head(features[-1]))
        return tuple(exits)


def test_a_densely_connected_network_carries_all_that_later_blocks_read(tmp_path: Path) -> None:
    network = Dense()

    bundle = export(network, torch.randn(2, 6), tmp_path / "dense")

    # Each block's features cross alone or concatenated with those before it: exporters share the concatenations.
    assert crossing(bundle)[0] == [(6,)]
    assert sum(size for (size,) in crossing(bundle)[2]) == 6 + 4 + 4
    x = torch.randn(4, 6)
    assert_equal_to(bundle, list(network(x)), x=x)


class Ensemble(nn.Module):
    """Each exit is the geometric (or additive) mean of its head and the exits before it."""

    def __init__(self, *, is_geometric: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.heads = nn.ModuleList([nn.Linear(8, 3) for _ in range(3)])
        self.is_geometric = is_geometric

    def forward(self, x: Tensor) -> list[Tensor]:
        running, exits = torch.zeros(x.size(0), 3), []
        for count, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True), start=1):
            x = block(x).tanh()
            running = running + (F.log_softmax(head(x), dim=1) if self.is_geometric else head(x))
            exits.append(running / count)
        return exits


@pytest.mark.parametrize("is_geometric", [True, False])
def test_an_ensemble_over_earlier_exits_carries_the_feature_map_and_the_running_sum(
    tmp_path: Path, is_geometric: bool
) -> None:
    network = Ensemble(is_geometric=is_geometric)

    bundle = export(network, torch.randn(1, 8), tmp_path / "ensemble")

    assert crossing(bundle) == [[(8,)], [(3,), (8,)], [(3,), (8,)]]
    x = torch.randn(7, 8)
    assert_equal_to(bundle, network(x), x=x)


class Transformer(nn.Module):
    """A class token expanded over the batch, positions, masked attention, an exit behind each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(20, 8), nn.Embedding(9, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.layers = nn.ModuleList(
            [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=True) for _ in range(2)]
        )
        self.heads = nn.ModuleList([nn.Linear(8, 4) for _ in range(2)])

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = torch.cat([self.token.expand(ids.size(0), -1, -1), self.embedding(ids)], dim=1)
        hidden = hidden + self.position(torch.arange(hidden.size(1), device=ids.device))
        ignored = torch.cat([torch.zeros(ids.size(0), 1, dtype=torch.bool), mask == 0], dim=1)
        exits = {}
        for index, (layer, head) in enumerate(zip(self.layers, self.heads, strict=True)):
            hidden = layer(hidden, src_key_padding_mask=ignored)
            exits[f"layer {index}"] = head(hidden[:, 0])
        return exits


def test_a_transformer_with_two_inputs_carries_no_sizes_and_no_positions(tmp_path: Path) -> None:
    network = Transformer()
    inputs = {"ids": torch.randint(0, 20, (2, 8)), "mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3])}

    bundle = export(network, inputs, tmp_path / "transformer", exits=["layer 0", "layer 1"])

    manifest = bundle.manifest
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in manifest.inputs] == [
        ("ids", "int64", (8,)),
        ("mask", "int64", (8,)),
    ]
    assert all(tensor.dtype != "int64" for tensor in manifest.carries)
    assert (9, 8) in crossing(bundle)[1]
    ids = torch.randint(0, 20, (5, 8))
    mask = (torch.arange(8) < torch.tensor([8, 1, 4, 7, 2])[:, None]).long()
    assert_equal_to(bundle, list(network.eval()(ids, mask).values()), ids=ids, mask=mask)


class Recurrent(nn.Module):
    """An LSTM whose state crosses the boundary with the batch on axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(3, 6, batch_first=True), nn.LSTM(6, 6, batch_first=True)
        self.heads = nn.ModuleList([nn.Linear(6, 3) for _ in range(2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden, state = self.first(x)
        deeper, _ = self.second(hidden, state)
        return [self.heads[0](hidden[:, -1]), self.heads[1](deeper[:, -1])]


def test_a_recurrent_state_crosses_with_the_batch_in_front(tmp_path: Path) -> None:
    network = Recurrent()

    bundle = export(network, torch.randn(1, 5, 3), tmp_path / "recurrent")

    assert crossing(bundle)[1] == [(1, 6), (1, 6), (5, 6)]
    x = torch.randn(6, 5, 3)
    assert_equal_to(bundle, network(x), x=x)


class Frames(nn.Module):
    """A video network that folds its frames into the batch until the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 3) for _ in range(2)])

    def forward(self, clip: Tensor) -> list[Tensor]:
        rows, frames = clip.shape[:2]
        a = self.first(clip.reshape(rows * frames, 4)).relu()
        b = self.second(a).relu()
        return [head(h.view(rows, frames, 4).mean(1)) for head, h in zip(self.heads, (a, b), strict=True)]


def test_frames_folded_into_the_batch_are_unfolded_at_the_boundary(tmp_path: Path) -> None:
    network = Frames()

    bundle = export(network, torch.randn(1, 6, 4), tmp_path / "frames")

    assert crossing(bundle)[1] == [(6, 4)]
    clip = torch.randn(5, 6, 4)
    assert_equal_to(bundle, network(clip), clip=clip)


@dataclass
class Output:
    features: Tensor
    logits: list[Tensor]


class ReturnsDataclass(Chain):
    def forward(self, x: Tensor) -> Output:  # type: ignore[override]
        maps = self.features(x)
        logits = [head(f.flatten(1)) for head, f in zip(self.heads, maps, strict=True)]
        return Output(maps[-1].flatten(1), logits)


def test_exits_are_named_by_path_and_may_get_names_of_their_own(tmp_path: Path) -> None:
    network, x = ReturnsDataclass().eval(), torch.randn(1, 1, 6, 6)

    all_of_them = export(network, x, tmp_path / "a", exits=[".logits"])
    two = export(network, x, tmp_path / "b", exits={"early": "out.logits[0]", "late": ".logits[2]"})

    assert len(all_of_them.manifest.exits) == 3
    assert [exit_.name for exit_ in two.manifest.exits] == ["early", "late"]
    assert two.manifest.exits[0].logits == "early.logits"
    expected = network(x).logits
    assert_equal_to(two, [expected[0], expected[2]], x=x)


def test_a_staged_module_needs_no_forward_of_its_own(tmp_path: Path) -> None:
    stages = [nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), nn.ReLU())]
    heads = [nn.Linear(8, 3), nn.Linear(8, 3)]

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages, self.exit_heads = nn.ModuleList(stages), nn.ModuleList(heads)

        def forward(self, x: Tensor) -> Tensor:
            for stage in self.stages:
                x = stage(x)
            final: Tensor = self.exit_heads[-1](x)
            return final

    x = torch.randn(3, 4)
    expected = StagedModule(stages, heads)(x)
    for name, network in {"joined": StagedModule(stages, heads), "own": Own()}.items():
        assert_equal_to(export(network, x, tmp_path / name), expected, **{_first_input(name): x})


def _first_input(name: str) -> str:
    return "input_0" if name == "joined" else "x"


def test_half_precision_scores_are_decided_in_float32(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(4, 3)).half()

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.net(x)]

    bundle = export(Half(), torch.randn(2, 4).half(), tmp_path / "half")

    assert bundle.manifest.precision == "fp16"
    assert answers(bundle, x=torch.randn(2, 4).half())[0].dtype == np.float32


def test_the_description_is_written_down(tmp_path: Path) -> None:
    steps: list[str] = []

    bundle = export(
        Chain(),
        torch.randn(1, 1, 6, 6),
        tmp_path / "chain",
        name="chain-5",
        labels=list("abcde"),
        preprocessing=ImagePreprocessing(mode="L", height=6, width=6, mean=(0.5,), std=(0.25,)),
        default_policy=EntropySpec(threshold=0.3),
        training={"epochs": 3, "accuracy": [0.8, 0.9, 0.95]},
        progress=steps.append,
    )

    manifest = open_bundle(tmp_path / "chain").manifest
    assert manifest == bundle.manifest
    assert (manifest.name, manifest.labels) == ("chain-5", tuple("abcde"))
    assert manifest.default_policy == EntropySpec(threshold=0.3)
    assert manifest.provenance.source.endswith("Chain")
    assert manifest.provenance.parameters == sum(p.numel() for p in Chain().parameters())
    assert manifest.provenance.training["epochs"] == 3
    assert "torch" in manifest.provenance.versions
    assert [step.split()[0] for step in steps] == ["tracing", "found", "cutting", "proving", "proving"]
    assert steps[1] == "found 3 exits: exit_0 = out[0], exit_1 = out[1], exit_2 = out[2]"


def test_the_tokenizer_of_a_text_network_is_copied_in(tmp_path: Path) -> None:
    (tmp_path / "tok.json").write_text("{}")
    preprocessing = TextPreprocessing(
        tokenizer=File(path="tok.json", sha256="0" * 64), ids="ids", mask="mask", length=8
    )
    inputs = {"ids": torch.randint(0, 20, (2, 8)), "mask": torch.ones(2, 8, dtype=torch.int64)}

    bundle = export(
        Transformer(), inputs, tmp_path / "text", preprocessing=preprocessing, tokenizer=tmp_path / "tok.json"
    )

    assert isinstance(bundle.manifest.preprocessing, TextPreprocessing)
    assert bundle.read(bundle.manifest.preprocessing.tokenizer) == b"{}"


def test_a_description_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    image = ImagePreprocessing(mode="RGB", height=6, width=6, mean=(0, 0, 0), std=(1, 1, 1))

    with pytest.raises(ExportError, match=r"images become one float32 input of shape \(3, 6, 6\)"):
        export(Chain(), torch.randn(1, 1, 6, 6), tmp_path / "a", preprocessing=image)
    with pytest.raises(TraceError, match=r"\(batch, 7\)"):
        export(Chain(), torch.randn(1, 1, 6, 6), tmp_path / "b", labels=list("abcdefg"))
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_replaced_only_when_asked_and_only_if_it_is_a_bundle(tmp_path: Path) -> None:
    x, out = torch.randn(1, 1, 6, 6), tmp_path / "chain"
    first = export(Chain(), x, out).manifest
    (tmp_path / "diary").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "diary" / "today.txt").write_text("dear diary")

    with pytest.raises(ExportError, match="exists"):
        export(Chain(), x, out)
    assert open_bundle(out).manifest == first
    second = export(Chain(), x, out, overwrite=True).manifest
    assert second != first
    assert open_bundle(out).manifest == second
    with pytest.raises(ExportError, match="is no bundle and is not overwritten"):
        export(Chain(), x, tmp_path / "diary", overwrite=True)
    assert export(Chain(), x, tmp_path / "empty").manifest.name == "chain"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chain", "diary", "empty"]


class Folded(Frames):
    """Folds its frames into the batch frame by frame, so that neighbours in the fold are different rows."""

    def forward(self, clip: Tensor) -> list[Tensor]:
        rows, frames = clip.shape[:2]
        a = self.first(clip.transpose(0, 1).reshape(rows * frames, 4)).relu()
        b = self.second(a).relu()
        return [head(h.view(frames, rows, 4).mean(0)) for head, h in zip(self.heads, (a, b), strict=True)]


@pytest.mark.parametrize(
    ("make", "row_shape", "sentence"),
    [
        (Folded, (6, 4), "exit 'exit_1', stage 'stage_1', tensor 'exit_1.logits'.*after other rows have left"),
    ],
)
def test_a_bundle_that_would_not_equal_the_network_is_not_written(
    tmp_path: Path, make: Callable[[], nn.Module], row_shape: tuple[int, ...], sentence: str
) -> None:
    with pytest.raises(ParityError, match=sentence):
        export(make(), torch.randn(2, *row_shape), tmp_path / "out")

    assert not list(tmp_path.iterdir())


class Squeezes(nn.Module):
    """Loses its batch axis at batch 1."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.head(x).unsqueeze(1).squeeze()]


def test_a_network_that_breaks_at_batch_one_says_so_in_its_manifest(tmp_path: Path) -> None:
    bundle = export(Squeezes(), torch.randn(1, 4), tmp_path / "squeezes")

    assert bundle.manifest.min_batch == 2


class SqueezesInVain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.head(x.squeeze(1)), self.head(x.relu().unsqueeze(1).squeeze(1).squeeze(-1))]


def test_a_squeeze_that_does_nothing_in_torch_does_nothing_in_the_bundle(tmp_path: Path) -> None:
    network = SqueezesInVain()

    bundle = export(network, torch.randn(2, 4), tmp_path / "idle")

    x = torch.randn(3, 4)
    assert_equal_to(bundle, network(x), x=x)


class Probabilities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.head(x).softmax(1)]


def test_the_logarithms_of_probabilities_are_taken_for_logits(tmp_path: Path) -> None:
    network, steps = Probabilities(), list[str]()

    bundle = export(network, torch.randn(2, 4), tmp_path / "out", progress=steps.append)

    assert "found 1 exit, so no row can leave early: exit_0 = log(out[0])" in steps
    assert "exit_0: these are probabilities, and their logarithms are taken for logits" in steps
    x = torch.randn(3, 4)
    assert_equal_to(bundle, [network(x)[0].log()], x=x)
