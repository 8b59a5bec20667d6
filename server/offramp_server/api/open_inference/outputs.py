"""The outputs on offer, made from the rows' answers.

Shapes: R = rows, C = classes. Every output has the batch first, and one number a row is a column, (R, 1).
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from offramp_contract.calibration import Calibration
from offramp_contract.errors import InvalidValue
from offramp_contract.manifest import Manifest
from offramp_contract.statistics import FloatArray, log_softmax

from offramp_server.api.open_inference.request import RequestedOutput
from offramp_server.api.open_inference.tensors import OutputTensor
from offramp_server.messages import Combine, RowAnswer
from offramp_server.served import ServedModel

LOGITS: Final = "logits"
PROBABILITIES: Final = "probabilities"
SCORES: Final = (LOGITS, PROBABILITIES)
OUTPUTS: Final = (LOGITS, PROBABILITIES, "class_id", "exit_index", "exit_reason", "depth")
DATATYPE_OF: Final = {
    LOGITS: "FP32", PROBABILITIES: "FP32", "class_id": "INT32", "exit_index": "INT32", "exit_reason": "BYTES",
    "depth": "FP32",
}  # fmt: skip


def requested_outputs(
    requested: Sequence[RequestedOutput], is_binary: bool, manifest: Manifest
) -> tuple[RequestedOutput, ...]:
    """Give the outputs that a request gets, each one that the model offers.

    A request that names none gets all but the probabilities, which follow from the logits and would double the body;
    and but the logits where exits differ in their number of classes, since one tensor might not hold them.

    Raises:
        InvalidValue: If one is not on offer, or its leading classes are asked for and it holds no scores.
    """
    for output in requested:
        if output.name not in OUTPUTS:
            raise InvalidValue(f"outputs: must be of {', '.join(OUTPUTS)}; got {output.name[:80]!r}", "outputs")
        if output.num_classes and output.name not in SCORES:
            raise InvalidValue(
                f"outputs.{output.name}.parameters.classification: only {' and '.join(SCORES)} hold scores",
                "classification",
            )
    if requested:
        return tuple(requested)
    left_out = {PROBABILITIES} if num_classes_of(manifest) is not None else set(SCORES)
    return tuple(RequestedOutput(name, is_binary) for name in OUTPUTS if name not in left_out)


def num_classes_of(manifest: Manifest) -> int | None:
    """Give the number of classes that all exits have; None if they differ."""
    counts = {exit_.num_classes for exit_ in manifest.exits}
    return counts.pop() if len(counts) == 1 else None


def needs_logits(outputs: Sequence[RequestedOutput]) -> bool:
    """Tell whether the engine has to bring logits back from the device."""
    return any(output.name in SCORES for output in outputs)


def output_tensors(
    outputs: Sequence[RequestedOutput], rows: Sequence[RowAnswer], served: ServedModel, combine: Combine
) -> list[OutputTensor]:
    """Make the tensors of an answer.

    Args:
        outputs: What is asked for.
        rows: One answer per row.
        served: The model that gave them.
        combine: How each answer was made of the exits seen.

    Raises:
        InvalidValue: If logits or probabilities are asked for and the rows left at exits of different numbers of
            classes.
    """
    return [_tensor(output, rows, served, combine) for output in outputs]


def _tensor(output: RequestedOutput, rows: Sequence[RowAnswer], served: ServedModel, combine: Combine) -> OutputTensor:
    match output.name:
        case "class_id":
            return _column(output.name, np.array([row.answer.top_class_K[0] for row in rows], np.int32))
        case "exit_index":
            return _column(output.name, np.array([row.answer.exit_index for row in rows], np.int32))
        case "depth":
            return _column(output.name, np.array([row.depth for row in rows], np.float32))
        case "exit_reason":
            return OutputTensor(output.name, (len(rows), 1), [row.reason.label.encode() for row in rows])
    scores_RC = _logits(output.name, rows)
    if output.name == PROBABILITIES:
        scores_RC = _probabilities(scores_RC, rows, served.manifest, served.calibration, combine)
    if output.num_classes:
        return _leading_classes(output, scores_RC, served.manifest.labels)
    return OutputTensor(output.name, scores_RC.shape, scores_RC)


def _column(name: str, values_R: np.ndarray) -> OutputTensor:
    return OutputTensor(name, (len(values_R), 1), values_R)


def _logits(name: str, rows: Sequence[RowAnswer]) -> FloatArray:
    logits = [row.answer.logits_C for row in rows if row.answer.logits_C is not None]
    if len(logits) == 1:
        return logits[0][None]
    counts = sorted({len(logits_C) for logits_C in logits})
    if len(counts) > 1:
        raise InvalidValue(
            f"outputs.{name}: rows left at exits of {' and '.join(map(str, counts))} classes, which one tensor cannot "
            "hold; ask for class_id, or let every row leave at the same exit",
            "outputs",
        )
    return np.stack(logits)


def _probabilities(
    logits_RC: FloatArray, rows: Sequence[RowAnswer], manifest: Manifest, calibration: Calibration, combine: Combine
) -> FloatArray:
    """Give softmax(logits / T); combined logits are log-probabilities already, so there T is 1."""
    temperature_R1 = np.array([[_temperature(row, manifest, calibration, combine)] for row in rows])
    probability_RC: FloatArray = np.exp(log_softmax(logits_RC / temperature_R1)).astype(np.float32)
    return probability_RC


def _temperature(row: RowAnswer, manifest: Manifest, calibration: Calibration, combine: Combine) -> float:
    num_seen = sum(manifest.stages[stage].exit is not None for stage in row.stages)
    return 1.0 if combine != "last" and num_seen > 1 else calibration.temperatures[row.answer.exit_index]


def _leading_classes(output: RequestedOutput, scores_RC: FloatArray, labels: Sequence[str] | None) -> OutputTensor:
    """Give the leading classes of each row as `score:index` or `score:index:label`, best first."""
    num_rows, num_classes = scores_RC.shape
    num_leading = min(output.num_classes, num_classes)
    order_RK = np.argsort(-scores_RC, axis=1, kind="stable")[:, :num_leading]
    elements = []
    for score_C, order_K in zip(scores_RC, order_RK, strict=True):
        for index in order_K.tolist():
            label = f":{labels[index]}" if labels is not None else ""
            elements.append(f"{score_C[index]:f}:{index}{label}".encode())
    return OutputTensor(output.name, (num_rows, num_leading), elements)
