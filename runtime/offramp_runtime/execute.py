"""A bundle's stages, loaded on a device: stage + carries -> outputs.

The server and the exporter's proof run stages through this module, so that the proof covers what serves.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from offramp_contract.errors import ManifestError
from offramp_contract.manifest import Manifest, Stage
from offramp_contract.statistics import FloatArray, decision_width

from offramp_runtime.bundle import Bundle
from offramp_runtime.device import Device, DeviceTensor


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What one run of a stage gives.

    Attributes:
        carries: The carries it emits, by name, on the device.
        logits: The exit's raw scores (B, C), on the device; None if the stage ends in no exit.
        decision_BD: The exit's packed statistics, on the host (`offramp_contract.statistics`).
    """

    carries: dict[str, DeviceTensor]
    logits: DeviceTensor | None
    decision_BD: FloatArray | None


class StageExecutor:
    """Holds one session per stage and runs them.

    Not thread-safe: one thread owns a device.
    """

    def __init__(self, bundle: Bundle, device: Device) -> None:
        self.manifest = bundle.manifest
        self.device = device
        self._sessions = [device.load(bundle.graph(i), stage.name) for i, stage in enumerate(self.manifest.stages)]
        for stage, session in zip(self.manifest.stages, self._sessions, strict=True):
            _check_graph(self.manifest, stage, session)
        temperatures = (np.array(value, dtype=np.float32) for value in bundle.calibration.temperatures)
        self._temperatures = [device.upload(value) for value in temperatures]

    def run(self, stage_index: int, carries: Mapping[str, DeviceTensor]) -> StageOutput:
        """Run one stage over one batch.

        Args:
            stage_index: Which stage.
            carries: A tensor of this device per name in the stage's `inputs`, all with the same number of rows.
        """
        stage = self.manifest.stages[stage_index]
        feeds = {name: carries[name] for name in stage.inputs}
        session = self._sessions[stage_index]
        if stage.exit is None:
            values, _ = self.device.run(session, feeds, stage.outputs, ())
            return StageOutput(dict(zip(stage.outputs, values, strict=True)), None, None)
        exit_ = self.manifest.exits[stage.exit]
        feeds[exit_.temperature] = self._temperatures[stage.exit]
        values, (decision_BD,) = self.device.run(session, feeds, (*stage.outputs, exit_.logits), (exit_.decision,))
        return StageOutput(dict(zip(stage.outputs, values[:-1], strict=True)), values[-1], decision_BD)


def run_all_exits(executor: StageExecutor, inputs: Mapping[str, np.ndarray]) -> list[tuple[FloatArray, FloatArray]]:
    """Run a batch through every stage.

    Args:
        executor: The loaded bundle.
        inputs: One array per model input, batch first.

    Returns:
        Per exit its logits (B, C) and packed decision (B, D), on the host.
    """
    carries: dict[str, DeviceTensor] = {name: executor.device.upload(array) for name, array in inputs.items()}
    exits = []
    for index in range(len(executor.manifest.stages)):
        output = executor.run(index, carries)
        carries |= output.carries
        if output.decision_BD is not None:
            exits.append((executor.device.download(output.logits), output.decision_BD))
    return exits


def _check_graph(manifest: Manifest, stage: Stage, session: ort.InferenceSession) -> None:
    """Refuse a graph whose signature is not the manifest's."""
    tensors = manifest.tensors
    expected = {name: (_onnx_type(tensors[name].dtype), tensors[name].shape) for name in stage.inputs}
    outputs = {name: (_onnx_type(tensors[name].dtype), tensors[name].shape) for name in stage.outputs}
    if stage.exit is not None:
        exit_ = manifest.exits[stage.exit]
        outputs[exit_.logits] = (_onnx_type("float32"), (exit_.num_classes,))
        outputs[exit_.decision] = (_onnx_type("float32"), (decision_width(exit_.num_classes),))
        temperature = next((value for value in session.get_inputs() if value.name == exit_.temperature), None)
        if temperature is None or temperature.shape != [] or temperature.type != _onnx_type("float32"):
            raise ManifestError(f"graph of {stage.name!r}: {exit_.temperature!r} must be a scalar float32 input")
        actual = [value for value in session.get_inputs() if value.name != exit_.temperature]
    else:
        actual = session.get_inputs()
    _check_signature(stage.name, "input", expected, actual)
    _check_signature(stage.name, "output", outputs, session.get_outputs())


def _check_signature(
    stage: str, side: str, expected: dict[str, tuple[str, tuple[int, ...]]], actual: list[ort.NodeArg]
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
        if value.type != kind or not fits or isinstance(batch, int):
            raise ManifestError(
                f"graph of {stage!r}: {side} {value.name!r} is {value.type} {value.shape}, "
                f"the manifest says {kind} [batch, {', '.join(map(str, row_shape))}]"
            )


def _onnx_type(dtype: str) -> str:
    spelled = {"float32": "float", "float64": "double", "float16": "float16"}
    return f"tensor({spelled.get(dtype, dtype)})"
