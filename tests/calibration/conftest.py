"""Traces that look like those of real early-exit networks, drawn instead of recorded."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from gated_bundles import CENTRAL, CHOICE, NESTED, ONE_EXIT, PRIORITIES, write_gated
from gated_samples import draw_gated
from offramp_calibration.calibrate import CalibrationSettings, calibrate
from offramp_calibration.labelled import Arrays
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.trace import About, Trace
from offramp_contract.calibration import Calibration
from offramp_contract.manifest import Manifest
from offramp_contract.statistics import BoolArray, Decision, FloatArray
from offramp_exporter import export
from offramp_runtime import open_bundle
from torch import nn

MakeTrace = Callable[..., Trace]


@pytest.fixture(scope="session")
def make_trace() -> MakeTrace:
    """Draw a trace; see `draw_trace` for what can be asked."""
    return draw_trace


@pytest.fixture(scope="session")
def trace() -> Trace:
    """2,000 samples, 5 exits, 10 classes."""
    return draw_trace()


@pytest.fixture(scope="session")
def outcomes(trace: Trace) -> Outcomes:
    """What `trace` comes to at temperatures of 1."""
    return Outcomes.of(trace)


@pytest.fixture(scope="session")
def make_outcomes() -> Callable[..., Outcomes]:
    """Write down what exits decide, by log-odds; see `outcomes_of_scores`."""
    return outcomes_of_scores


def outcomes_of_scores(
    log_odds_NE: Sequence[Sequence[float]] | FloatArray,
    right_NE: Sequence[Sequence[bool]] | BoolArray | None = None,
    depth_E: Sequence[float] | None = None,
) -> Outcomes:
    """Give exits that say these log-odds; the right class is 0, a wrong answer is 1; by default all are right."""
    scores_NE = np.asarray(log_odds_NE, dtype=np.float32)
    num_samples, num_exits = scores_NE.shape
    class_NE = np.zeros(scores_NE.shape, np.int32) if right_NE is None else 1 - np.asarray(right_NE, dtype=np.int32)
    packed_NED = np.zeros((num_samples, num_exits, 5), np.float32)
    packed_NED[:, :, 0], packed_NED[:, :, 4] = scores_NE, class_NE
    decision_E = tuple(Decision(packed_NED[:, index]) for index in range(num_exits))
    depths = np.arange(1, num_exits + 1) / num_exits if depth_E is None else np.array(depth_E)
    return Outcomes(np.zeros(num_samples, np.int64), decision_E, class_NE, depths)


def draw_trace(
    num_samples: int = 2000,
    num_exits: int = 5,
    num_classes: int = 10,
    *,
    seed: int = 0,
    sharpness: float = 2.5,
    depth_E: Sequence[float] | None = None,
) -> Trace:
    """Draw what a network with exits of growing skill might say about samples of varying difficulty.

    A logit is what the exit makes of the right class plus noise, of which most is common to all exits: they mistake the
    same samples. The right class stands out by an amount that differs a lot between samples, so that the exits are far
    too sure of the easy ones (log-odds of 40 and more) and wrong on many of the hard ones.

    Args:
        sharpness: Factor on all logits; above 1 the exits are over-confident, more so the deeper.
        depth_E: Share of the full path's FLOPs at each exit; None: rising ever faster to 1.
    """
    rng = np.random.default_rng(seed)
    label_N = rng.integers(num_classes, size=num_samples)
    ease_N = rng.gamma(2.0, 2.5, size=num_samples)
    common_NC = rng.normal(size=(num_samples, num_classes))
    logits_ENC = []
    for skill in np.linspace(0.5, 1.0, num_exits):
        logits_NC = 0.8 * common_NC + 0.6 * rng.normal(size=common_NC.shape)
        logits_NC[np.arange(num_samples), label_N] += skill * (ease_N + 0.5)
        logits_ENC.append((sharpness * (0.5 + skill) * logits_NC).astype(np.float32))
    about = About(
        model="drawn",
        model_digest=hashlib.sha256(b"drawn").hexdigest(),
        data_digest=hashlib.sha256(f"{num_samples} {seed}".encode()).hexdigest(),
        depth_E=tuple(depth_E or (np.linspace(1 / num_exits, 1.0, num_exits) ** 1.2).tolist()),
    )
    return Trace(about, label_N, tuple(logits_ENC))


class Residual(nn.Module):
    """Four exits over twelve numbers, whose opinions differ; nothing is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.heads = nn.ModuleList(nn.Linear(12, 5) for _ in range(4))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        logits = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = x + torch.tanh(2 * block(x))
            logits.append(3 * head(x))
        return logits


class Returning(Residual):
    """Returns early by itself: by a probability, by the gap between two, and by what two exits agree on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x = x + torch.tanh(2 * self.blocks[0](x))
        first: torch.Tensor = 3 * self.heads[0](x)
        if first.softmax(1).max() > 0.7:
            return first
        x = x + torch.tanh(2 * self.blocks[1](x))
        second: torch.Tensor = 3 * self.heads[1](x)
        top = second.softmax(1).topk(2)[0][0]
        if top[0] - top[1] >= 0.4:
            return second
        x = x + torch.tanh(2 * self.blocks[2](x))
        third: torch.Tensor = 3 * self.heads[2](x)
        if torch.equal(second.argmax(1), third.argmax(1)):
            return third
        x = x + torch.tanh(2 * self.blocks[3](x))
        return 3 * self.heads[3](x)  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def returning_network() -> Returning:
    """The network behind `returning`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Returning().eval()


@pytest.fixture(scope="session")
def returning(returning_network: Returning, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a network that leaves by rules of its own."""
    folder = tmp_path_factory.mktemp("exported") / "returning"
    export(returning_network, torch.linspace(-2, 2, 48).view(4, 12), folder, name="returning")
    return folder


@pytest.fixture(scope="session")
def network() -> Residual:
    """The network behind `exported`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Residual().eval()


@pytest.fixture(scope="session")
def exported(network: Residual, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real bundle, cut by the exporter and run by ONNX Runtime."""
    folder = tmp_path_factory.mktemp("exported") / "residual"
    export(network, torch.zeros(4, 12), folder, name="residual")
    return folder


@pytest.fixture(scope="session")
def evaluated(make_bundle: Callable[..., Path]) -> Callable[..., tuple[Manifest, Calibration, Trace]]:
    """Give a manifest, its calibration on drawn samples, and a trace of other ones.

    `calibrated=False` gives a bare calibration, `num_samples` and `seed` are the trace's.
    """
    folder = make_bundle(name="drawn", row_shape=(10,), num_classes=10, gains=(1.0,) * 5, labels=tuple("0123456789"))
    manifest = open_bundle(folder).manifest

    def fitted(trace: Trace) -> Trace:
        about = About(manifest.name, manifest.model_digest, trace.about.data_digest, manifest.exit_depths)
        return Trace(about, trace.label_N, trace.logits_ENC)

    calibration = calibrate(fitted(draw_trace(3000, seed=7)), CalibrationSettings(num_settings=20, num_kept=20))

    def make(*, calibrated: bool = True, **drawn: int) -> tuple[Manifest, Calibration, Trace]:
        chosen = calibration if calibrated else Calibration.bare(manifest)
        return manifest, chosen, fitted(draw_trace(**drawn))

    return make


@pytest.fixture(scope="session")
def gated_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the bundle of a gated network by hand, by the name of its kind."""
    kinds = {"one exit": ONE_EXIT, "central": CENTRAL, "nested": NESTED, "choice": CHOICE}
    written: dict[str, Path] = {}

    def give(kind: str) -> Path:
        if kind not in written:
            priorities = PRIORITIES if kind == "choice" else ()
            folder = tmp_path_factory.mktemp("gated") / "bundle"
            written[kind] = write_gated(folder, kinds[kind], name="gated", priorities=priorities)
        return written[kind]

    return give


@pytest.fixture(scope="session")
def gated_samples() -> Callable[..., Arrays]:
    """Draw samples of a gated bundle, mostly labelled with what the network says with its own gates."""

    def draw(folder: Path, num_samples: int, seed: int = 0) -> Arrays:
        x, label_N = draw_gated(folder, num_samples, seed)
        return Arrays("drawn", {"x": x}, label_N, open_bundle(folder).manifest)

    return draw
