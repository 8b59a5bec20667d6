"""A bundle's stages, loaded on a device: stage + carries -> outputs.

The server and the exporter's proof run stages through this module, so that the proof covers what serves.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from offramp_contract.errors import ManifestError
from offramp_contract.manifest import Manifest, Stage
from offramp_contract.statistics import FloatArray, decision_width

from offramp_runtime.bundle import Bundle
from offramp_runtime.interface import Device, DeviceTensor, LoadedGraph
from offramp_runtime.weights import SharedArrays


class StageOutput(NamedTuple):
    """What one run of a stage gives.

    Attributes:
        carries: The carries it emits, by name, on the device.
        logits: The exit's raw scores (B, C), on the device; None if the stage ends in no exit.
        decision_BD: The exit's packed statistics, on the host (`offramp_contract.statistics`).
        scores_BK: The scores of the gates that the stage decides, on the host; None if it decides none.
    """

    carries: dict[str, DeviceTensor]
    logits: DeviceTensor | None = None
    decision_BD: FloatArray | None = None
    scores_BK: FloatArray | None = None


class StageExecutor:
    """Holds one session per stage and runs them.

    Several threads may run stages at the same time.
    """

    def __init__(self, bundle: Bundle, device: Device) -> None:
        self.manifest = bundle.manifest
        self.device = device
        shared = bundle.shared_arrays()
        self._stages = [_load(bundle, device, shared, index) for index in range(len(self.manifest.stages))]

    def run(self, stage_index: int, carries: Mapping[str, DeviceTensor]) -> StageOutput:
        """Run one stage over one batch.

        Args:
            stage_index: Which stage.
            carries: A tensor of this device per name in the stage's `inputs`, all with the same number of rows.
        """
        loaded = self._stages[stage_index]
        stage = loaded.stage
        kept, told = loaded.graph.run({name: carries[name] for name in stage.inputs})
        return StageOutput(
            carries=dict(zip(stage.outputs, kept, strict=False)),
            logits=None if stage.exit is None else kept[-1],
            decision_BD=None if stage.exit is None else told[-1],
            scores_BK=None if stage.scores is None else told[0],
        )

    def session(self, stage_index: int) -> ort.InferenceSession:
        """Give the session that runs a stage, for those who measure it alone."""
        return self._stages[stage_index].session

    def tune(self, stage_index: int, carries: Mapping[str, DeviceTensor]) -> None:
        """Find out by measuring how a stage runs fastest at this number of rows, for the warm-up; see `run`."""
        loaded = self._stages[stage_index]
        loaded.graph.tune({name: carries[name] for name in loaded.stage.inputs})


@dataclass(frozen=True, slots=True)
class _LoadedStage:
    stage: Stage
    session: ort.InferenceSession
    graph: LoadedGraph


def _load(bundle: Bundle, device: Device, shared: SharedArrays, index: int) -> _LoadedStage:
    manifest = bundle.manifest
    stage = manifest.stages[index]
    filled, lent = shared.fill(bundle.graph(index), stage.name)
    session = device.load(filled, stage.name, lent)
    _check_graph(manifest, stage, session)
    outputs, host = [*stage.outputs], [] if stage.scores is None else [stage.scores]
    constants = {}
    if stage.exit is not None:
        exit_ = manifest.exits[stage.exit]
        outputs.append(exit_.logits)
        host.append(exit_.decision)
        constants[exit_.temperature] = np.array(bundle.calibration.temperatures[stage.exit], dtype=np.float32)
    graph = device.prepare(session, filled, constants=constants, outputs=outputs, host=host)
    return _LoadedStage(stage, session, graph)


def _check_graph(manifest: Manifest, stage: Stage, session: ort.InferenceSession) -> None:
    """Refuse a graph whose signature is not the manifest's."""
    tensors = manifest.tensors
    expected = {name: (_onnx_type(tensors[name].dtype), tensors[name].shape) for name in stage.inputs}
    outputs = {name: (_onnx_type(tensors[name].dtype), tensors[name].shape) for name in stage.outputs}
    if stage.scores is not None:
        num_scored = sum(gate.stage == manifest.stages.index(stage) for gate in manifest.gates)
        outputs[stage.scores] = (_onnx_type("float32"), (num_scored,))
    if stage.exit is not None:
        exit_ = manifest.exits[stage.exit]
        outputs[exit_.logits] = (_onnx_type("float32"), (exit_.num_classes,))
        outputs[exit_.decision] = (
            _onnx_type("float32"),
            (decision_width(exit_.num_classes, exit_.native is not None),),
        )
        temperature = next((value for value in session.get_inputs() if value.name == exit_.temperature), None)
        if temperature is None or temperature.shape != [] or temperature.type != _onnx_type("float32"):
            raise ManifestError(f"graph of {stage.name!r}: {exit_.temperature!r} must be a scalar float32 input")
        actual = [value for value in session.get_inputs() if value.name != exit_.temperature]
    else:
        actual = session.get_inputs()
    is_one_row = manifest.max_batch == 1
    _check_signature(stage.name, "input", expected, actual, is_one_row=is_one_row)
    _check_signature(stage.name, "output", outputs, session.get_outputs(), is_one_row=is_one_row)


def _check_signature(
    stage: str,
    side: str,
    expected: dict[str, tuple[str, tuple[int, ...]]],
    actual: list[ort.NodeArg],
    *,
    is_one_row: bool,
) -> None:
    names = {value.name for value in actual}
    if names != set(expected):
        raise ManifestError(f"graph of {stage!r} has {side}s {sorted(names)}, the manifest says {sorted(expected)}")
    for value in actual:
        kind, row_shape = expected[value.name]
        batch, *row = value.shape or [0]  # a scalar, or a graph that does not say: neither has a batch axis
        fits = len(row) == len(row_shape) and all(
            not isinstance(size, int) or size == wanted for size, wanted in zip(row, row_shape, strict=True)
        )
        if value.type != kind or not fits or (isinstance(batch, int) and not (is_one_row and batch == 1)):
            raise ManifestError(
                f"graph of {stage!r}: {side} {value.name!r} is {value.type} {value.shape}, "
                f"the manifest says {kind} [batch, {', '.join(map(str, row_shape))}]"
            )


def _onnx_type(dtype: str) -> str:
    spelled = {"float32": "float", "float64": "double", "float16": "float16"}
    return f"tensor({spelled.get(dtype, dtype)})"
