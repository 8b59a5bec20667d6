"""The OpenAPI document: every path, body, status and a real example of each."""

from copy import deepcopy
from importlib.metadata import version
from typing import Any, Final

from pydantic.json_schema import models_json_schema

from offramp_server.api import open_inference
from offramp_server.api.model_schemas import ModelDescription, ModelList, OperatingPointList
from offramp_server.api.problems import PROBLEM_JSON
from offramp_server.api.schemas import ClassifyAnswer, ClassifyRequest, Problem, RoutingFields

_SCHEMAS: Final = (ClassifyRequest, ClassifyAnswer, ModelList, ModelDescription, OperatingPointList, Problem)

_REF = "#/components/schemas/{model}"
_STATUS: Final = {
    400: "The request cannot be read: broken JSON, a truncated image, a wrong JSON type.",
    401: "The operator asks for an API key, and it is missing or wrong.",
    404: "No model of that name is served.",
    408: "The body did not arrive in time.",
    413: "The body, an image or the number of rows is over the operator's limit.",
    415: "The content type or encoding is not read here.",
    422: "A value the model cannot honour; `detail` names the field and what is allowed.",
    431: "The request line and headers are over the operator's limit.",
    429: "More work than the server can promise to do; `Retry-After` says when to come back.",
    500: "A stage of the model failed, or the server did.",
    503: "The server is loading or draining.",
    504: "The deadline passed before any exit could answer, and `on_miss` is `reject`.",
}
_CLASSIFY_STATUS: Final = tuple(_STATUS)
_DESCRIBE_STATUS: Final = (400, 401, 404, 431, 500, 503)

_ANSWER_EXAMPLE: Final = {
    "model": "digits",
    "version": "3f9c01a4be77",
    "predictions": [
        {
            "label": "7",
            "class_id": 7,
            "probability": 0.983,
            "top": [{"label": "7", "class_id": 7, "probability": 0.983}],
            "exit": {"index": 1, "name": "exit_1", "of": 4, "reason": "confident", "forced": False},
            "depth": 0.41,
            "stages": ["stage_0", "stage_1"],
            "score": 0.983,
            "threshold": 0.9,
        }
    ],
    "policy": {"kind": "confidence", "operating_point": None, "certified": None, "gear": None},
    "timing": {"queue_ms": 0.4, "compute_ms": 3.1, "total_ms": 4.0, "budget_ms": 20.0},
}
_REQUEST_EXAMPLES: Final = {
    "one row": {"value": {"inputs": [0.0, 0.5, 1.0], "policy": "confidence", "threshold": 0.9}},
    "an image, within 20 ms": {"value": {"image": "iVBORw0KGgo=", "latency_ms": 20}},
    "a text": {"value": {"text": "well worth seeing", "policy": {"kind": "patience", "patience": 2}}},
    "half of the compute": {"value": {"inputs": [0.0, 0.5, 1.0], "compute": 0.5, "explain": True}},
    "every block that scores at least 0.3": {
        "value": {"inputs": [0.0, 0.5, 1.0], "gate_threshold": 0.3, "explain": True}
    },
    "as full depth, but for 2 %": {"value": {"inputs": [0.0, 0.5, 1.0], "risk": {"epsilon": 0.02, "delta": 0.1}}},
}
_EVENTS_EXAMPLE: Final = 'event: exit\ndata: {"row": 0, "label": "7"}\n\nevent: answer\ndata: {"model": "digits"}\n\n'
_MODEL_PARAMETER: Final = {
    "name": "model", "in": "path", "required": True, "description": "A served model's name; GET /v1/models lists them.",
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"}, "example": "digits",
}  # fmt: skip


def openapi_document() -> dict[str, Any]:
    """Give the document of the whole server."""
    _, schemas = models_json_schema([(model, "serialization") for model in _SCHEMAS], ref_template=_REF)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Offramp",
            "version": version("offramp"),
            "description": "Early-exit inference: say how good, how fast or how cheap the answer has to be.",
        },
        "paths": {**_classify_paths(), **_model_paths(), **_operation_paths(), **open_inference.openapi_paths()},
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        # Whether a key is asked for is the operator's choice; an empty requirement stands for "none".
        "security": [{}, {"bearer": []}, {"key": []}],
    }


def _classify_paths() -> dict[str, Any]:
    operation = {
        "tags": ["classify"],
        "description": "Answers every row at the earliest exit that its policy and budgets allow. "
        "With `Accept: text/event-stream`, an answer at every exit reached, and a last one.",
        "requestBody": _bodies(),
        "responses": {
            "200": {
                "description": "The answer, one prediction per input.",
                "headers": {name: _header(about) for name, about in _ANSWER_HEADERS.items()},
                "content": {
                    "application/json": {"schema": _ref("ClassifyAnswer"), "example": _ANSWER_EXAMPLE},
                    "text/event-stream": {"schema": {"type": "string"}, "example": _EVENTS_EXAMPLE},
                },
            },
            **_problems(_CLASSIFY_STATUS),
        },
    }
    one = {**operation, "operationId": "classify", "summary": "Classify with the only or default model",
           "parameters": _query_parameters()}  # fmt: skip
    named = {**deepcopy(operation), "operationId": "classify_with", "summary": "Classify with a named model",
             "parameters": [_MODEL_PARAMETER, *_query_parameters()]}  # fmt: skip
    return {"/v1/classify": {"post": one}, "/v1/models/{model}/classify": {"post": named}}


def _bodies() -> dict[str, Any]:
    binary = {"type": "string", "format": "binary"}
    form = {
        "type": "object",
        "properties": {"image": {"type": "array", "items": binary}},
        "required": ["image"],
        "description": "One or more parts named `image`; other parts are fields, named as the query parameters are.",
    }
    return {
        "required": True,
        "content": {
            "application/json": {"schema": _ref("ClassifyRequest"), "examples": _REQUEST_EXAMPLES},
            "image/*": {"schema": binary},
            "multipart/form-data": {"schema": form},
            "application/x-npy": {"schema": {**binary, "description": "One array, with or without the batch axis."}},
        },
    }


def _query_parameters() -> list[dict[str, Any]]:
    """Give the routing fields as query parameters; objects are written as JSON."""
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": field.description,
            "schema": {"type": _QUERY_TYPES.get(name, "string")},
        }
        for name, field in RoutingFields.model_fields.items()
    ]


_QUERY_TYPES: Final = {
    "patience": "integer", "latency_ms": "number", "compute": "number", "accuracy": "number", "min_exit": "integer",
    "max_exit": "integer", "top_k": "integer", "explain": "boolean",
}  # fmt: skip
_ANSWER_HEADERS: Final = {
    "x-request-id": "The request's own id, or the server's.",
    "x-model-version": "Which version of the model answered.",
    "x-gear": "The gear that served the request, where the choice was left to a server that has some.",
    "x-queue-time-ms": "Milliseconds spent waiting.",
    "x-compute-time-ms": "Milliseconds the stages ran.",
    "x-total-time-ms": "Milliseconds from arrival to answer.",
}


def _model_paths() -> dict[str, Any]:
    def get(operation_id: str, summary: str, schema: str, *, is_named: bool) -> dict[str, Any]:
        return {
            "get": {
                "tags": ["models"],
                "operationId": operation_id,
                "summary": summary,
                "parameters": [_MODEL_PARAMETER] if is_named else [],
                "responses": {
                    "200": {"description": summary, "content": {"application/json": {"schema": _ref(schema)}}},
                    **_problems(_DESCRIBE_STATUS),
                },
            }
        }

    points = get("operating_points", "A model's operating points", "OperatingPointList", is_named=True)
    return {
        "/v1/models": get("list_models", "The served models", "ModelList", is_named=False),
        "/v1/models/{model}": get("describe_model", "What a model may be asked", "ModelDescription", is_named=True),
        "/v1/models/{model}/operating-points": points,
    }


def _operation_paths() -> dict[str, Any]:
    content = {
        "text/plain": {"schema": {"type": "string"}},
        "application/openmetrics-text": {"schema": {"type": "string"}},
    }
    responses = {"200": {"description": "Prometheus exposition.", "content": content}}
    return {"/metrics": {"get": {"tags": ["operations"], "operationId": "metrics", "summary": "Metrics",
                                 "security": [], "responses": responses}}}  # fmt: skip


def _problems(statuses: tuple[int, ...]) -> dict[str, Any]:
    return {
        str(status): {"description": _STATUS[status], "content": {PROBLEM_JSON: {"schema": _ref("Problem")}}}
        for status in statuses
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=name)}


def _header(about: str) -> dict[str, Any]:
    return {"description": about, "schema": {"type": "string"}}
