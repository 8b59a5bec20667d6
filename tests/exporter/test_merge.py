"""A bundle without some of its exits is the one that `export` writes of the network without them."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from offramp_contract.calibration import CALIBRATION_FILE, Calibration
from offramp_contract.errors import ExportError, ParityError, SplitError
from offramp_contract.manifest import TextPreprocessing
from offramp_contract.policy import Reason, Seen
from offramp_contract.policy_spec import ConfidenceSpec, FixedSpec, NativeSpec
from offramp_contract.statistics import Decision
from offramp_exporter import export
from offramp_exporter.boundary import crossings
from offramp_exporter.merge import merge_exits, prove_merge, without_exits
from offramp_exporter.rejoin import rejoin
from offramp_exporter.split import split
from offramp_runtime import Bundle, StageExecutor, open_bundle, open_device, run_all_exits
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

DEVICE = open_device("cpu", threads=1)


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Convolutions(nn.Module):
    """A chain of convolutions; the heads flatten with the batch size written out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(c, 4, 3, padding=1) for c in (1, 4, 4, 4)])
        self.heads = nn.ModuleList([nn.Linear(4 * 36, 5) for _ in range(4)])

    def forward(self, x: Tensor) -> list[Tensor]:
        exits = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x).relu()
            exits.append(head(x.view(x.size(0), -1)))
        return exits


class Dense(nn.Module):
    """Every block reads all earlier features, and the input again."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6 + 4 * k, 4) for k in range(4)])
        self.heads = nn.ModuleList([nn.Linear(4, 3) for _ in range(4)])

    def forward(self, x: Tensor) -> list[Tensor]:
        features, exits = [x], []
        for block, head in zip(self.blocks, self.heads, strict=True):
            features.append(block(torch.cat(features, dim=1)).relu())
            exits.append(head(features[-1]))
        return exits


class Ensemble(nn.Module):
    """Each exit is the mean of its head and all heads before it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.heads = nn.ModuleList([nn.Linear(8, 3) for _ in range(4)])

    def forward(self, x: Tensor) -> list[Tensor]:
        running, exits = torch.zeros(x.size(0), 3), []
        for count, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True), start=1):
            x = block(x).tanh()
            running = running + nn.functional.log_softmax(head(x), dim=1)
            exits.append(running / count)
        return exits


class SharedHead(nn.Module):
    """The last two heads read what the first one's hidden layer makes; the third reads the first exit's scores."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.hidden = nn.Linear(8, 6)
        self.heads = nn.ModuleList([nn.Linear(width, 3) for width in (6, 8, 11, 14)])

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for block in self.blocks:
            x = block(x).tanh()
            maps.append(x)
        hidden = self.hidden(maps[0]).relu()
        first, second = self.heads[0](hidden), self.heads[1](maps[1])
        third = self.heads[2](torch.cat([maps[2], first], dim=1))
        return [first, second, third, self.heads[3](torch.cat([maps[3], hidden], dim=1))]


class TwoInputs(nn.Module):
    """Embedded ids; the mask is read by the second head and the last block only."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.heads = nn.ModuleList([nn.Linear(8, 3) for _ in range(3)])

    def forward(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        first = self.blocks[0](self.embedding(ids)).relu()
        second = self.blocks[1](first).relu()
        third = self.blocks[2](second * mask[:, :, None]).relu()
        masked = second * (1 - mask[:, :, None])
        return [head(h.sum(1)) for head, h in zip(self.heads, (first, masked, third), strict=True)]


class Recurrent(nn.Module):
    """Three LSTMs whose states cross the boundaries with the batch on axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.LSTM(width, 6, batch_first=True) for width in (3, 6, 6)])
        self.heads = nn.ModuleList([nn.Linear(6, 3) for _ in range(3)])

    def forward(self, x: Tensor) -> list[Tensor]:
        state, exits = None, []
        for layer, head in zip(self.layers, self.heads, strict=True):
            x, state = layer(x, state)
            exits.append(head(x[:, -1]))
        return exits


class Frames(nn.Module):
    """A video network that folds its frames into the batch until the end."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.heads = nn.ModuleList([nn.Linear(4, 3) for _ in range(3)])

    def forward(self, clip: Tensor) -> list[Tensor]:
        rows, frames = clip.shape[:2]
        x, exits = clip.reshape(rows * frames, 4), []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x).relu()
            exits.append(head(x.view(rows, frames, 4).mean(1)))
        return exits


class Half(Convolutions):
    """Heads that compute in half precision."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(x.half())


def _images() -> Tensor:
    return torch.randn(3, 1, 6, 6)


def _texts() -> tuple[Tensor, Tensor]:
    return torch.randint(20, (3, 7)), (torch.rand(3, 7) > 0.3).float()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor | tuple[Tensor, ...]]]] = {
    "convolutions": (Convolutions, _images),
    "dense": (Dense, lambda: torch.randn(3, 6)),
    "ensemble": (Ensemble, lambda: torch.randn(3, 8)),
    "shared head": (SharedHead, lambda: torch.randn(3, 8)),
    "two inputs": (TwoInputs, _texts),
    "recurrent": (Recurrent, lambda: torch.randn(3, 5, 3)),
    "frames": (Frames, lambda: torch.randn(3, 2, 4)),
    "half": (lambda: Half().half(), _images),
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Bundle]]:
    """Every network with its bundle."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("networks")
    made = {}
    for name, (make, draw) in NETWORKS.items():
        network = make().eval()
        made[name] = (network, export(network, draw(), folder / name.replace(" ", "_"), name=name.replace(" ", "-")))
    return made


def _drops(num_exits: int) -> list[tuple[int, ...]]:
    deciding = range(num_exits - 1)
    return [drop for size in range(1, num_exits) for drop in itertools.combinations(deciding, size)]


def _operators(bundle: Bundle, stage: int) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_from_string(bundle.graph(stage)).graph.node)


def _logits(bundle: Bundle, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [logits for logits, _ in run_all_exits(StageExecutor(bundle, DEVICE), arrays)]


THREE_EXITS = ("two inputs", "recurrent", "frames")
CASES = [(name, drop) for name in NETWORKS for drop in _drops(3 if name in THREE_EXITS else 4)]


@pytest.mark.parametrize(
    ("name", "drop"),
    [(name, drop) for name, drop in CASES if drop in ((1,), (0, 1) if name in THREE_EXITS else (0, 2))],
)
def test_it_is_the_bundle_that_export_writes_of_the_network_without_those_exits(
    name: str, drop: tuple[int, ...], networks: dict[str, tuple[nn.Module, Bundle]], tmp_path: Path
) -> None:
    network, bundle = networks[name]
    kept = [index for index in range(len(bundle.manifest.exits)) if index not in drop]
    paths = {bundle.manifest.exits[index].name: f"[{index}]" for index in kept}

    merged = merge_exits(bundle, drop, tmp_path / "merged")

    wanted = export(network, NETWORKS[name][1](), tmp_path / "wanted", exits=paths)
    for index, (stage, twin) in enumerate(zip(merged.manifest.stages, wanted.manifest.stages, strict=True)):
        assert (stage.flops, stage.carry_bytes) == (twin.flops, twin.carry_bytes)
        assert len(stage.inputs) == len(twin.inputs)
        assert stage.name == bundle.manifest.stages[kept[index]].name, "a stage keeps the name of where its exit was"
        if name != "recurrent":  # its transposes torch folds, where no exit stands between them
            assert _operators(merged, index) == _operators(wanted, index)
    assert merged.manifest.precision == wanted.manifest.precision
    assert [exit_.name for exit_ in merged.manifest.exits] == list(paths)


@pytest.mark.parametrize(("name", "drop"), CASES)
def test_the_exits_that_stay_answer_as_before_at_any_batch_size(
    name: str, drop: tuple[int, ...], networks: dict[str, tuple[nn.Module, Bundle]]
) -> None:
    _, bundle = networks[name]
    inputs = NETWORKS[name][1]()
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    rows = {tensor.name: value.numpy() for tensor, value in zip(bundle.manifest.inputs, tensors, strict=True)}

    merged = without_exits(bundle, drop)

    prove_merge(bundle, merged, drop, DEVICE, rows)
    tolerance = 2e-2 if name == "half" else 1e-5
    for batch in (1, 2, 11):
        arrays = {key: value[np.arange(batch) % len(value)] for key, value in rows.items()}
        before = [logits for index, logits in enumerate(_logits(bundle, arrays)) if index not in drop]
        for logits, expected in zip(_logits(merged, arrays), before, strict=True):
            np.testing.assert_allclose(logits, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NETWORKS)
def test_joined_and_cut_at_the_same_exits_a_bundle_is_what_it_was(
    name: str, networks: dict[str, tuple[nn.Module, Bundle]]
) -> None:
    manifest = networks[name][1].manifest

    program = rejoin(networks[name][1])
    plans = split(program)

    names = {value: one.tensor.name for value, one in crossings(program, plans).items()}
    cut = [([names[value] for value in plan.reads], [names[value] for value in plan.emits]) for plan in plans]
    assert cut == [(list(stage.inputs), list(stage.outputs)) for stage in manifest.stages]


def test_a_dropped_head_is_gone_and_its_operations_are_not_counted(
    networks: dict[str, tuple[nn.Module, Bundle]], tmp_path: Path
) -> None:
    _, bundle = networks["convolutions"]

    merged = merge_exits(bundle, [1], tmp_path / "merged")

    head = 5 * (2 * 144 + 1)
    assert merged.manifest.full_flops == bundle.manifest.full_flops - head
    one, other, both = _operators(bundle, 1), _operators(bundle, 2), _operators(merged, 1)
    assert both == one + other - Counter(_decision_and_head(one))
    assert both["Conv"] == 2
    assert both["Gemm"] == both["TopK"] == 1
    graph = onnx.load_from_string(merged.graph(1))
    onnx.checker.check_model(graph, full_check=True)
    assert not [name for node in graph.graph.node for name in node.output if name.startswith("exit_1")]
    assert [value.name for value in graph.graph.input] == [*merged.manifest.stages[1].inputs, "exit_2.temperature"]
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in graph.graph.output] == ["batch"] * 3
    assert graph.opset_import == onnx.load_from_string(bundle.graph(1)).opset_import


def _decision_and_head(stage: Counter[str]) -> Counter[str]:
    """Count what a stage of `Convolutions` holds beside its block; the batch size is read once in the joined stage."""
    return stage - Counter(["Conv", "Relu"])


def test_what_crossed_the_vanished_boundary_only_is_gone_and_the_rest_stays(
    networks: dict[str, tuple[nn.Module, Bundle]], tmp_path: Path
) -> None:
    chain = merge_exits(networks["convolutions"][1], [1], tmp_path / "chain").manifest
    dense = merge_exits(networks["dense"][1], [1], tmp_path / "dense").manifest

    assert [tensor.shape for tensor in chain.carries] == [(4, 6, 6)] * 2
    assert [stage.carry_bytes for stage in chain.stages] == [576, 576, 0]
    # behind the joined stage: the input and the features of three blocks
    assert [stage.carry_bytes for stage in dense.stages] == [40, 72, 0]


def test_the_thresholds_of_the_default_policy_lose_the_dropped_exits(tmp_path: Path) -> None:
    listed = export(
        Dense(), torch.randn(2, 6), tmp_path / "listed", default_policy=ConfidenceSpec(threshold=(0.1, 0.2, 0.3))
    )
    fixed = export(Dense(), torch.randn(2, 6), tmp_path / "fixed", default_policy=FixedSpec(exit=2))

    assert merge_exits(listed, [1], tmp_path / "a").manifest.default_policy == ConfidenceSpec(threshold=(0.1, 0.3))
    assert merge_exits(fixed, [0], tmp_path / "b").manifest.default_policy == FixedSpec(exit=1)
    assert merge_exits(fixed, [1, 2], tmp_path / "c").manifest.default_policy == FixedSpec(exit=1)


class Returning(nn.Module):
    """Returns early: by a number, where three conditions meet, and by another number; all read one large table."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, width) / 3)
        self.heads = nn.ModuleList([nn.Linear(width, 4) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for index, head in enumerate(self.heads[:3]):
            h = (x @ self.table).tanh()
            logits: Tensor = head(h)
            p = logits.softmax(1)
            if index == 1 and p.max() > 0.4 and p.argmax() != 3:
                return logits
            if index != 1 and p.max() > (0.45 if index == 0 else 0.36):
                return logits
            x = x + h @ self.table.T
        return self.heads[3]((x @ self.table).tanh())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def returning(tmp_path_factory: pytest.TempPathFactory) -> tuple[Returning, Bundle, Tensor]:
    """That network, its bundle, whose weights are stored once, and inputs that together take all its exits."""
    torch.manual_seed(0)
    network, x = Returning().eval(), torch.randn(200, 8) * torch.linspace(0.1, 3, 200)[:, None]
    return network, export(network, x[:4], tmp_path_factory.mktemp("returning") / "bundle"), x


def _leave(bundle: Bundle, x: Tensor) -> tuple[list[int], list[np.ndarray]]:
    """Let rows leave by the bundle's own rules; give the exit and the logits of each."""
    native = bundle.manifest.native
    answers = run_all_exits(StageExecutor(bundle, DEVICE), {"x": x.numpy()})
    taken = np.full(len(x), len(answers) - 1)
    for index in reversed(range(len(answers) - 1)):
        assert native is not None
        _, decision = answers[index]
        seen = Seen(index, Decision(decision), np.zeros((len(x), index + 1), np.int32))
        taken[native.policy(None)(seen) == Reason.NATIVE] = index
    return taken.tolist(), [answers[index][0][row] for row, index in enumerate(taken)]


@pytest.mark.parametrize("drop", _drops(4))
def test_a_merged_bundle_leaves_by_the_networks_own_rules_at_the_exits_that_stay(
    drop: tuple[int, ...], returning: tuple[Returning, Bundle, Tensor], tmp_path: Path
) -> None:
    _, bundle, x = returning
    kept = [index for index in range(4) if index not in drop]
    before, _ = _leave(bundle, x)
    assert len(set(before)) == 4, "every exit is taken"

    merged = merge_exits(bundle, drop, tmp_path / "merged")

    after, logits = _leave(merged, x)
    stays = [row for row, index in enumerate(before) if index not in drop]
    assert [kept[after[row]] for row in stays] == [before[row] for row in stays]
    assert all(kept[after[row]] > before[row] for row in range(len(x)) if row not in stays)
    whole = _logits(bundle, {"x": x.numpy()})
    for row in range(len(x)):
        np.testing.assert_allclose(logits[row], whole[kept[after[row]]][row], rtol=1e-5, atol=1e-5)
    assert [exit_.native for exit_ in merged.manifest.exits] == [bundle.manifest.exits[index].native for index in kept]
    wanted = NativeSpec() if len(kept) > 1 else FixedSpec(exit=0)
    assert merged.manifest.default_policy == wanted
    assert {name for one in merged.manifest.predicates for name in one.answers} == {f"exit_{index}" for index in kept}


def test_a_merged_bundle_stores_shared_weights_once_still(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = Returning(width=4096).eval(), torch.randn(4, 8)
    bundle = export(network, x, tmp_path / "bundle")
    assert bundle.manifest.shared_weights is not None

    merged = merge_exits(bundle, [1], tmp_path / "merged")

    shared = merged.manifest.shared_weights
    assert shared is not None
    assert (8, 4096) in [tensor.shape for tensor in shared.tensors]
    content = b"".join(merged.read(file) for file in merged.manifest.files)
    assert content.count(network.table.detach().numpy().tobytes()) == 1
    _, logits = _leave(merged, x)
    whole = _logits(bundle, {"x": x.numpy()})
    taken, _ = _leave(merged, x)
    for row, index in enumerate(taken):
        np.testing.assert_allclose(logits[row], whole[(0, 2, 3)[index]][row], rtol=1e-5, atol=1e-5)


def test_a_merged_bundle_says_what_it_was_and_has_no_calibration(
    networks: dict[str, tuple[nn.Module, Bundle]], tmp_path: Path
) -> None:
    _, bundle = networks["dense"]
    calibration = Calibration(model_digest=bundle.manifest.model_digest, temperatures=(2.0,) * 4)

    once = merge_exits(replace(bundle, calibration=calibration), [1], tmp_path / "once")
    twice = merge_exits(once, [0], tmp_path / "twice")

    assert once.manifest.provenance.training["dropped_exits"] == ["exit_1"]
    assert twice.manifest.provenance.training["dropped_exits"] == ["exit_1", "exit_0"]
    assert once.manifest.model_digest != bundle.manifest.model_digest
    assert once.calibration == Calibration.bare(once.manifest)
    assert not (tmp_path / "once" / CALIBRATION_FILE).exists()
    at_once = without_exits(bundle, [0, 1])
    assert [s.flops for s in twice.manifest.stages] == [s.flops for s in at_once.manifest.stages]
    assert _operators(twice, 0) == _operators(at_once, 0)


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    texts = TextPreprocessing(
        tokenizer={"path": "tokenizer.json", "sha256": "0" * 64}, ids="ids", mask="mask", length=7
    )
    ids, mask = _texts()
    bundle = export(
        TwoInputs(), (ids, mask), tmp_path / "b", preprocessing=texts, tokenizer=tmp_path / "tokenizer.json"
    )

    merged = merge_exits(bundle, [1], tmp_path / "merged")

    assert merged.manifest.preprocessing == bundle.manifest.preprocessing
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("drop", [(), (3,), (-1,), (0, 7)])
def test_only_exits_before_the_final_one_can_be_dropped(
    drop: tuple[int, ...], networks: dict[str, tuple[nn.Module, Bundle]], tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="exits 0 to 2; the final exit 3 stays"):
        merge_exits(networks["dense"][1], drop, tmp_path / "merged")

    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_replaced_only_when_asked(
    networks: dict[str, tuple[nn.Module, Bundle]], tmp_path: Path
) -> None:
    _, bundle = networks["dense"]
    merge_exits(bundle, [0], tmp_path / "merged")

    with pytest.raises(ExportError, match="exists; choose another folder"):
        merge_exits(bundle, [1], tmp_path / "merged")
    assert [e.name for e in open_bundle(tmp_path / "merged").manifest.exits] == ["exit_1", "exit_2", "exit_3"]
    merge_exits(bundle, [1], tmp_path / "merged", overwrite=True)
    assert [e.name for e in open_bundle(tmp_path / "merged").manifest.exits] == ["exit_0", "exit_2", "exit_3"]


@pytest.mark.parametrize(
    "examples",
    [{}, {"y": np.zeros((2, 6), np.float32)}, {"x": np.zeros((2, 5), np.float32)}, {"x": np.zeros((0, 6), np.float32)}],
)
def test_examples_must_be_what_the_bundle_takes(
    examples: dict[str, np.ndarray], networks: dict[str, tuple[nn.Module, Bundle]], tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"examples: the bundle takes x float32 \(rows, 6,\)"):
        merge_exits(networks["dense"][1], [0], tmp_path / "merged", examples=examples)

    assert not list(tmp_path.iterdir())


def test_a_bundle_that_answers_otherwise_is_refused(networks: dict[str, tuple[nn.Module, Bundle]]) -> None:
    _, bundle = networks["dense"]

    with pytest.raises(ParityError, match=r"exit 'exit_0', stage 'stage_0'.*differs"):
        prove_merge(bundle, without_exits(bundle, [1]), [0], DEVICE)


def test_graphs_that_use_one_name_for_different_things_are_joined(
    make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    # Every stage of the toy calls its scores "logits", and its differing weight "gain".
    bundle = open_bundle(make_bundle(gains=(1.0, 2.0, 3.0, 4.0)))
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)

    merged = merge_exits(bundle, [0, 2], tmp_path / "merged")

    for logits, gain in zip(_logits(merged, {"x": x}), (2.0, 4.0), strict=True):
        np.testing.assert_allclose(logits, gain * x, rtol=1e-6)


def _scale_by_temperature(model: onnx.ModelProto) -> None:
    (last,) = (node for node in model.graph.node if "logits" in node.output)
    last.input[1] = "T"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_scale_by_temperature, "scores or carries depend on 'T', which is no carry"),
        (lambda model: model.opset_import[0].CopyFrom(helper.make_opsetid("", 19)), "another version of ONNX's"),
        (lambda model: model.graph.node.append(_branch()), "functions, branches or loops"),
    ],
)
def test_graphs_that_cannot_be_joined_are_refused_naming_the_stage(
    spoil: Callable[[onnx.ModelProto], None], sentence: str, make_bundle: Callable[..., Path]
) -> None:
    folder = make_bundle()
    bundle = open_bundle(folder)
    model = onnx.load_from_string(bundle.graph(1))
    spoil(model)
    content = model.SerializeToString()
    (folder / "stages" / "01.onnx").write_bytes(content)
    stages = list(bundle.manifest.stages)
    file = stages[1].graph.model_copy(update={"sha256": hashlib.sha256(content).hexdigest()})
    stages[1] = stages[1].model_copy(update={"graph": file})
    spoilt = replace(bundle, manifest=bundle.manifest.model_copy(update={"stages": tuple(stages)}))

    with pytest.raises(SplitError, match=f"stage 'stage_1'.*{sentence}"):
        without_exits(spoilt, [0])


def _branch() -> onnx.NodeProto:
    shape = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    body = helper.make_graph(
        [helper.make_node("Constant", [], ["y"], value=numpy_helper.from_array(np.zeros(1, np.float32)))],
        "b",
        [],
        [shape],
    )
    return helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body)
