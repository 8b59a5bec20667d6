"""`GET /v1/models…`: what is served and what may be asked of it."""

from typing import Any

import orjson
from offramp_contract.calibration import OperatingPoint
from offramp_contract.manifest import Manifest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from offramp_server.choice import choose
from offramp_server.context import context_of
from offramp_server.fields import ON_MISS, combinations_of, kinds_of
from offramp_server.ladder import Gear
from offramp_server.served import ServedModel


def routes() -> list[Route]:
    """Give the routes that describe models."""
    return [
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{model}", describe_model, methods=["GET"]),
        Route("/v1/models/{model}/operating-points", list_operating_points, methods=["GET"]),
    ]


async def list_models(request: Request) -> Response:
    """List the served models, the newest version of each."""
    return _json({"models": [_summary(served) for served in context_of(request).repository.served()]})


async def describe_model(request: Request) -> Response:
    """Describe one model: inputs, labels, stages, exits, gates, policies, costs."""
    context = context_of(request)
    served = context.repository.find(request.path_params["model"])
    manifest = served.manifest
    default = choose({}, manifest, served.calibration, context.settings.defaults_of(served.name))
    return _json(
        {
            **_summary(served),
            "precision": manifest.precision,
            "inputs": [tensor.model_dump(mode="json") for tensor in manifest.inputs],
            "preprocessing": _preprocessing(manifest),
            "labels": manifest.labels,
            "stages": _stages(served),
            "exits": _exits(manifest),
            "gates": _gates(manifest),
            "predicates": [predicate.model_dump(mode="json") for predicate in manifest.predicates],
            "default_policy": default.policy.model_dump(mode="json"),
            "default_operating_point": None if default.point is None else default.point.name,
            "policies": kinds_of(manifest),
            "combine": combinations_of(manifest),
            "on_miss": ON_MISS,
            "num_operating_points": len(served.calibration.operating_points),
            "gear": context.engine.gear_of(served),
            "gears": [_gear(number, gear, served) for number, gear in enumerate(served.ladder)],
            "provenance": manifest.provenance.model_dump(mode="json"),
        }
    )


async def list_operating_points(request: Request) -> Response:
    """List a model's calibrated operating points, cheapest first."""
    served = context_of(request).repository.find(request.path_params["model"])
    calibration = served.calibration
    points = sorted(calibration.operating_points, key=lambda point: point.compute)
    return _json(
        {
            "model": served.name,
            "version": served.version,
            "data_digest": calibration.data_digest,
            "num_samples": calibration.num_samples,
            "temperatures": calibration.temperatures,
            "operating_points": [_point(point, served) for point in points],
        }
    )


def _gear(number: int, gear: Gear, served: ServedModel) -> dict[str, Any]:
    point = gear.point
    return {
        "gear": number,
        "policy": gear.policy_spec.model_dump(mode="json"),
        "operating_point": None if point is None else point.name,
        "gate_threshold": None if point is None else point.gate_threshold,
        "compute": None if point is None else point.compute,
        "accuracy": None if point is None else point.accuracy,
        "expected_ms": round(served.costs.asked_s(number) * 1e3, 4),
        "certificates": [certificate.model_dump(exclude={"data_digest"}) for certificate in gear.certificates],
    }


def _point(point: OperatingPoint, served: ServedModel) -> dict[str, Any]:
    described = point.model_dump(mode="json", exclude={"certificates"})
    certificates = [certificate.model_dump(exclude={"data_digest"}) for certificate in point.certificates]
    return described | {
        "expected_ms": round(served.expected_s(point) * 1e3, 4),
        "certificates": certificates,
    }


def _summary(served: ServedModel) -> dict[str, Any]:
    manifest = served.manifest
    return {
        "name": served.name,
        "version": served.version,
        "task": manifest.task,
        "num_stages": len(manifest.stages),
        "num_exits": len(manifest.exits),
        "num_classes": manifest.exits[-1].num_classes,
    }


def _preprocessing(manifest: Manifest) -> dict[str, Any] | None:
    if manifest.preprocessing is None:
        return None
    return manifest.preprocessing.model_dump(mode="json", exclude={"tokenizer"})


def _stages(served: ServedModel) -> list[dict[str, Any]]:
    return [
        {
            "name": stage.name,
            "exit": stage.exit,
            "gates": [served.manifest.gates[gate].name for gate in stage.gates],
            "flops": stage.flops,
            "carry_bytes": stage.carry_bytes,
            "measured_ms": {str(batch): round(s * 1e3, 4) for batch, s in measured.items()},
        }
        for stage, measured in zip(
            served.manifest.stages, (profile.measured for profile in served.profile.stages), strict=True
        )
    ]


def _exits(manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {
            "index": index,
            "name": exit_.name,
            "stage": manifest.stages[exit_.stage].name,
            "depth": round(depth, 6),
            "num_classes": exit_.num_classes,
            "native": None if exit_.native is None else exit_.native.model_dump(mode="json"),
        }
        for index, (exit_, depth) in enumerate(zip(manifest.exits, manifest.exit_depths, strict=True))
    ]


def _gates(manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {
            "name": gate.name,
            "stage": None if gate.stage is None else manifest.stages[gate.stage].name,
            "priority": gate.priority,
            "threshold": gate.threshold,
            "stages": [stage.name for stage in manifest.stages if index in stage.gates],
        }
        for index, gate in enumerate(manifest.gates)
    ]


def _json(document: dict[str, Any]) -> Response:
    return Response(orjson.dumps(document), media_type="application/json")
