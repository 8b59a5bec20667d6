"""What all exports of a test session share."""

from collections.abc import Callable, Iterator
from copy import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from early_networks import OnTheEdge
from early_oracle import images
from habit_table import HABITS
from offramp_exporter import export
from offramp_runtime import Bundle
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry


@pytest.fixture(scope="session", autouse=True)
def _translations_are_read_once() -> Iterator[None]:
    """Keep torch.onnx's table of translations, which it reads anew from 500 sources for every export: half the time."""
    read = cache(ONNXRegistry.from_torchlib)

    def from_torchlib(opset_version: int) -> ONNXRegistry:
        registry = copy(read(opset_version=opset_version))
        registry.functions = {target: list(known) for target, known in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[type[nn.Module]], Path]:
    """Export a network that returns early, once a session."""

    @cache
    def export_once(kind: type[nn.Module]) -> Path:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        out = tmp_path_factory.mktemp("early") / kind.__name__
        export(kind().eval(), torch.full((1, 8), 0.5) if kind is OnTheEdge else images()[:4], out)
        return out

    return export_once


@pytest.fixture(scope="session")
def exported_habit(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[nn.Module, Bundle]]:
    """Export the network of a habit, once a session."""

    @cache
    def export_once(name: str) -> tuple[nn.Module, Bundle]:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        network = HABITS[name].make()
        out = tmp_path_factory.mktemp("habit") / "bundle"
        return network, export(network, HABITS[name].example(), out, exits=HABITS[name].exits)

    return export_once
