"""`GET /v2…`: whether the server and its models are well, what the models read and give, what they have done."""

from importlib.metadata import version
from typing import Any, Final

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from offramp_server.api.open_inference.asked import asked_model, version_number
from offramp_server.api.open_inference.outputs import DATATYPE_OF, OUTPUTS, SCORES, num_classes_of
from offramp_server.api.open_inference.tensors import DATATYPES
from offramp_server.context import context_of
from offramp_server.served import ServedModel
from offramp_server.settings import ServerSettings
from offramp_server.tally import Tally, Timed

EXTENSIONS: Final = (
    "binary_tensor_data", "classification", "model_configuration", "model_repository", "parameters", "statistics",
)  # fmt: skip
PLATFORM: Final = "onnxruntime_onnx"
ANY_SIZE: Final = -1
NS_PER_S: Final = 1e9


def routes() -> list[Route]:
    """Give the routes that describe; `/v2/models/stats` goes before the models' own."""
    described = {"": describe_model, "/ready": model_is_ready, "/config": configure_model, "/stats": count_model}
    return [
        Route("/v2", describe_server, methods=["GET"]),
        Route("/v2/health/live", is_live, methods=["GET"]),
        Route("/v2/health/ready", is_ready, methods=["GET"]),
        Route("/v2/models/stats", count_all, methods=["GET"]),
        *(
            Route(f"/v2/models/{{model}}{which}{suffix}", endpoint, methods=["GET"])
            for which in ("", "/versions/{version}")
            for suffix, endpoint in described.items()
        ),
    ]


async def describe_server(request: Request) -> Response:
    """Say what this server is and can."""
    return json_response({"name": "offramp", "version": version("offramp"), "extensions": EXTENSIONS})


async def is_live(request: Request) -> Response:
    """Say whether the engine's thread runs; a server that drains is live."""
    is_alive = context_of(request).engine.is_alive
    return json_response({"live": True}) if is_alive else _unwell("live", "the engine has died")


async def is_ready(request: Request) -> Response:
    """Say whether requests are admitted: by the engine's own word, and with at least one model."""
    context = context_of(request)
    reason = context.engine.why_not_ready
    if reason is None and not context.repository.served():
        reason = "no model is served yet"
    return json_response({"ready": True}) if reason is None else _unwell("ready", reason)


async def model_is_ready(request: Request) -> Response:
    """Say whether a model's requests are admitted."""
    served, reason = asked_model(request), context_of(request).engine.why_not_ready
    return json_response({"name": served.name, "ready": True}) if reason is None else _unwell("ready", reason)


async def describe_model(request: Request) -> Response:
    """Say what a model reads and gives."""
    served = asked_model(request)
    inputs = [
        {"name": tensor.name, "datatype": DATATYPES[tensor.dtype], "shape": [ANY_SIZE, *tensor.shape]}
        for tensor in served.manifest.inputs
    ]
    outputs = [
        {"name": name, "datatype": DATATYPE_OF[name], "shape": [ANY_SIZE, _width(name, served)]} for name in OUTPUTS
    ]
    return json_response(
        {"name": served.name, "versions": [served.version], "platform": PLATFORM, "inputs": inputs, "outputs": outputs}
    )


async def configure_model(request: Request) -> Response:
    """Give a model's configuration in Triton's form."""
    return json_response(_configuration(asked_model(request), context_of(request).settings))


async def count_model(request: Request) -> Response:
    """Give what a model has done since it was loaded, in Triton's form."""
    return json_response({"model_stats": [_statistics(asked_model(request))]})


async def count_all(request: Request) -> Response:
    """Give what every model has done since it was loaded."""
    return json_response({"model_stats": [_statistics(served) for served in context_of(request).repository.served()]})


def json_response(document: Any, status: int = 200) -> Response:
    """Answer with JSON."""
    return Response(orjson.dumps(document), status, media_type="application/json")


def _unwell(question: str, reason: str) -> Response:
    return json_response({question: False, "error": reason}, 503)


def _width(name: str, served: ServedModel) -> int:
    """Give the size of an output's second axis; unknown where the exits differ in their number of classes."""
    if name not in SCORES:
        return 1
    num_classes = num_classes_of(served.manifest)
    return ANY_SIZE if num_classes is None else num_classes


def _configuration(served: ServedModel, settings: ServerSettings) -> dict[str, Any]:
    inputs = [
        {"name": tensor.name, "data_type": f"TYPE_{DATATYPES[tensor.dtype]}", "dims": list(tensor.shape)}
        for tensor in served.manifest.inputs
    ]
    outputs = [
        {
            "name": name,
            "data_type": f"TYPE_{DATATYPE_OF[name]}".replace("BYTES", "STRING"),
            "dims": [_width(name, served)],
        }
        for name in OUTPUTS
    ]
    gates = ",".join(gate.name for gate in served.manifest.gates)
    return {
        "name": served.name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "max_batch_size": min(settings.max_rows, settings.max_inflight_samples),
        "input": inputs,
        "output": outputs,
        "dynamic_batching": {},
        "parameters": {"gates": {"string_value": gates}} if gates else {},
    }


def _statistics(served: ServedModel) -> dict[str, Any]:
    tally: Tally = served.tally
    return {
        "name": served.name,
        "version": version_number(served),
        "last_inference": int(tally.last_answer_s * 1e3),
        "inference_count": tally.num_rows,
        "execution_count": tally.num_executions,
        "inference_stats": {
            "success": _timed(tally.answered),
            "fail": _timed(tally.failed),
            "queue": _timed(tally.queue),
            **_computed(tally.compute),
            "cache_hit": _timed(Timed()),
            "cache_miss": _timed(Timed()),
        },
        "batch_stats": [
            {"batch_size": size, **_computed(ran)} for size, ran in sorted(tally.dispatches.copy().items())
        ],
    }


def _computed(timed: Timed) -> dict[str, Any]:
    """Book all of it under inference; Triton's tools insist on equal counts for what is around it."""
    nothing = {"count": timed.count, "ns": 0}
    return {"compute_input": nothing, "compute_infer": _timed(timed), "compute_output": nothing}


def _timed(timed: Timed) -> dict[str, int]:
    return {"count": timed.count, "ns": int(timed.seconds * NS_PER_S)}
