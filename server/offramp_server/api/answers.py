"""The engine's results as the JSON that people read."""

from math import isfinite
from typing import Any, NamedTuple

import orjson
from offramp_contract.calibration import Certificate
from offramp_contract.errors import OfframpError
from offramp_contract.manifest import Manifest
from starlette.responses import Response

from offramp_server.api.problems import problem_of
from offramp_server.fields import Routing
from offramp_server.messages import ExitAnswer, Progress, Result, RowAnswer
from offramp_server.served import ServedModel

NUM_DECIMALS = 6


def failure_of(result: Result) -> OfframpError | None:
    """Give the first row's error if every row's answer is an error: then it is the whole request's answer."""
    failures = [row for row in result.rows if isinstance(row, OfframpError)]
    return failures[0] if len(failures) == len(result.rows) else None


class ServedBy(NamedTuple):
    """The rule that served a request, whether it asked for that itself or a gear put it in place.

    Attributes:
        kind: The kind of policy.
        operating_point: The calibrated point it comes from, if it comes from one.
        certificate: What it was chosen for, if that is certified.
    """

    kind: str
    operating_point: str | None
    certificate: Certificate | None


def served_by(result: Result, served: ServedModel, routing: Routing) -> ServedBy:
    """Name the rule that served a request."""
    if not result.gear:
        return ServedBy(routing.options.policy_spec.kind, routing.options.operating_point, routing.certificate)
    gear = served.ladder[result.gear]
    return ServedBy(gear.policy_spec.kind, None if gear.point is None else gear.point.name, gear.certificates[0])


def answer_document(result: Result, served: ServedModel, routing: Routing) -> dict[str, Any]:
    """Give the whole answer of a request."""
    used = served_by(result, served, routing)
    return {
        "model": served.name,
        "version": served.version,
        "predictions": [_prediction(row, served.manifest, routing) for row in result.rows],
        "policy": {
            "kind": used.kind,
            "operating_point": used.operating_point,
            "certified": None if used.certificate is None else used.certificate.model_dump(exclude={"data_digest"}),
            "gear": result.gear,
        },
        "timing": {
            "queue_ms": _milliseconds(result.queue_s),
            "compute_ms": _milliseconds(result.compute_s),
            "total_ms": _milliseconds(result.total_s),
            "budget_ms": result.budget_ms,
        },
    }


def answer_response(result: Result, served: ServedModel, routing: Routing) -> Response:
    """Answer with JSON, and with what proxies and load tests read in the headers."""
    body = orjson.dumps(answer_document(result, served, routing))
    return Response(body, 200, answer_headers(result, served), "application/json")


def answer_headers(result: Result, served: ServedModel) -> dict[str, str]:
    """Give the headers of an answer: who answered, and what the time went to."""
    gear = {} if result.gear is None else {"x-gear": str(result.gear)}
    return gear | {
        "x-model-version": served.version,
        "x-queue-time-ms": f"{result.queue_s * 1e3:.3f}",
        "x-compute-time-ms": f"{result.compute_s * 1e3:.3f}",
        "x-total-time-ms": f"{result.total_s * 1e3:.3f}",
    }


def progress_document(progress: Progress, served: ServedModel, routing: Routing) -> dict[str, Any]:
    """Give one exit's answer on the way, for one row."""
    return {
        "row": progress.row,
        **_exit_document(progress.answer, served.manifest, routing.top_k),
        "depth": round(progress.depth, NUM_DECIMALS),
    }


def _prediction(row: RowAnswer | OfframpError, manifest: Manifest, routing: Routing) -> dict[str, Any]:
    if isinstance(row, OfframpError):
        return {"error": problem_of(row)}
    exit_index = row.answer.exit_index
    prediction = {
        **_leading(row.answer, manifest, routing.top_k),
        "exit": {
            "index": exit_index,
            "name": manifest.exits[exit_index].name,
            "of": len(manifest.exits),
            "reason": row.reason.label,
            "forced": row.reason.is_forced,
        },
        "depth": round(row.depth, NUM_DECIMALS),
        "stages": [manifest.stages[index].name for index in row.stages],
        "score": round(float(row.score), NUM_DECIMALS),
        "threshold": row.threshold,
    }
    if manifest.gates:
        prediction["gates"] = _gates_document(row, manifest)
    if routing.options.explain:
        prediction["exits"] = [_exit_document(answer, manifest, routing.top_k) for answer in row.seen]
    return prediction


def _gates_document(row: RowAnswer, manifest: Manifest) -> dict[str, Any]:
    document: dict[str, Any] = {
        "open": row.gate_decisions.count("open"),
        "forced": row.gate_decisions.count("forced"),
        "of": len(manifest.gates),
    }
    if row.gates_seen:
        document["decisions"] = [
            {
                "name": gate.name,
                "score": None if seen.score is None else round(seen.score, NUM_DECIMALS),
                "threshold": seen.threshold if isfinite(seen.threshold) else None,
                "decision": seen.decision,
            }
            for gate, seen in zip(manifest.gates, row.gates_seen, strict=True)
        ]
    return document


def _exit_document(answer: ExitAnswer, manifest: Manifest, top_k: int) -> dict[str, Any]:
    return {
        "exit": {
            "index": answer.exit_index,
            "name": manifest.exits[answer.exit_index].name,
            "of": len(manifest.exits),
        },
        **_leading(answer, manifest, top_k),
        "entropy": round(float(answer.entropy), NUM_DECIMALS),
        "margin": round(float(answer.margin), NUM_DECIMALS),
    }


def _leading(answer: ExitAnswer, manifest: Manifest, top_k: int) -> dict[str, Any]:
    top = [
        {"label": _label(manifest, class_id), "class_id": class_id, "probability": round(probability, NUM_DECIMALS)}
        for class_id, probability in zip(
            answer.top_class_K[:top_k].tolist(), answer.top_probability_K[:top_k].tolist(), strict=True
        )
    ]
    return {**top[0], "top": top}


def _label(manifest: Manifest, class_id: int) -> str:
    return manifest.labels[class_id] if manifest.labels is not None else str(class_id)


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 3)
