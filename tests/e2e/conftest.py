"""A small network trained on real digits, exported, and served by `offramp serve` in a process of its own."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from gated_trainings import GATED
from offramp_cli.__main__ import app
from offramp_cli.server_process import server_process
from offramp_exporter import export
from offramp_models import load_data
from offramp_models.data import ImageDataSet
from offramp_models.gates import HARD, GatedPass, Relaxation
from offramp_models.networks import MultiExitCNN, NetworkPlan
from offramp_models.networks.gated_network import GatedNetwork
from offramp_models.training import TrainingSettings, train
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

SERVE_FLAGS = ("--device", "cpu", "--threads", "1", "--warm-up-s", "0.3")


@dataclass(frozen=True)
class Trained:
    """A trained network and the bundle made of it."""

    network: torch.nn.Module
    data: ImageDataSet
    bundle: Path

    def eager(self, inputs: np.ndarray) -> list[np.ndarray]:
        """Give every exit's logits as torch computes them."""
        with torch.inference_mode():
            return [logits.numpy() for logits in self.network(torch.from_numpy(inputs))]


@dataclass(frozen=True)
class TrainedGates(Trained):
    """A trained network with gates and the bundle made of it."""

    network: GatedNetwork

    def passed(self, inputs: np.ndarray, relax: Relaxation = HARD) -> GatedPass:
        """Send inputs through as torch computes it; gives logits, scores and decisions."""
        with torch.inference_mode():
            return self.network.pass_gates(torch.from_numpy(inputs), relax)


@dataclass(frozen=True)
class Served:
    """A server that runs in a process of its own."""

    url: str
    client: httpx.Client

    def classify(self, images: np.ndarray, **query: str) -> httpx.Response:
        """Send images as one array."""
        file = io.BytesIO()
        np.save(file, images)
        headers = {"content-type": "application/x-npy"}
        return self.client.post("/v1/classify", params=query, content=file.getvalue(), headers=headers)

    def counters(self) -> dict[tuple[str, str], float]:
        """Give how often each stage ran and over how many rows, by (`runs` or `rows`, stage)."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        return {
            (kind, sample.labels["stage"]): sample.value
            for kind, name in (("runs", "offramp_stage_batch_size_count"), ("rows", "offramp_stage_batch_size_sum"))
            for sample in samples
            if sample.name == name
        }


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train for a few seconds: exit 0 is weak, the final exit good."""
    data = load_data("digits")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MultiExitCNN(widths=(8, 16, 24), blocks=(1, 1, 2), strides=(1, 2, 1), upscale=1)
    record = train(network, data, TrainingSettings(epochs=4))
    bundle = tmp_path_factory.mktemp("e2e") / "digits"
    inputs = torch.from_numpy(data.inputs(data.calibration)[:8])
    described = {"labels": data.label_names, "preprocessing": data.preprocessing, "training": record.to_json()}
    export(network, inputs, bundle, name="digits", **described)
    return Trained(network, data, bundle)


@pytest.fixture(scope="session")
def gated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainedGates]:
    """Train networks for a second or two each and export them, all from the command line and into one folder."""
    folder, data = tmp_path_factory.mktemp("gated"), load_data("digits")
    offramp = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    trained = {}
    for name, (network, *flags) in GATED.items():
        weights, record = folder / f"{name}.pt", folder / f"{name}.json"
        bundle = folder / "bundles" / name
        told = (
            network,
            "--weights",
            weights,
            "--training",
            record,
            "--data",
            "digits",
            "--name",
            name,
            "--out",
            bundle,
        )
        for command in (("train", "--network", network, *flags, "--threads", 1, "--out", weights), ("export", *told)):
            done = offramp.invoke(app, [str(word) for word in command])
            assert done.exit_code == 0, done.output
        plan = NetworkPlan.from_record(json.loads(record.read_text()))
        assert plan is not None
        built = plan.build(seed=1)
        built.load_state_dict(torch.load(weights, weights_only=True))
        assert isinstance(built, GatedNetwork)
        trained[name] = TrainedGates(built.eval(), data, bundle)
    return trained


@pytest.fixture(scope="session")
def served_gates(serve: Callable[[Path], Served], gated: dict[str, TrainedGates]) -> Served:
    """Serve them together."""
    return serve(gated["skipnet"].bundle.parent)


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Served]]:
    """Serve a bundle until the end of the session."""
    with ExitStack() as stack:

        def start(bundle: Path) -> Served:
            log = tmp_path_factory.mktemp("log") / "server.log"
            url = stack.enter_context(server_process(bundle, log, SERVE_FLAGS))
            client = stack.enter_context(httpx.Client(base_url=url, trust_env=False, timeout=60))
            return Served(url, client)

        yield start


@pytest.fixture(scope="session")
def served(serve: Callable[[Path], Served], trained: Trained) -> Served:
    """Serve the trained bundle."""
    return serve(trained.bundle)


@pytest.fixture(scope="session")
def png_files(trained: Trained) -> list[bytes]:
    """Give the test images as files."""
    return [_png(pixels) for pixels in trained.data.test.pixels_NHW]


def _png(pixels_HW: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_HW).save(file, "PNG")
    return file.getvalue()
