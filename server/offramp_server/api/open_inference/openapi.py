"""The `/v2` paths of the OpenAPI document: what is offered of the Open Inference Protocol."""

from typing import Any, Final

from offramp_server.api.open_inference.outputs import DATATYPE_OF, OUTPUTS
from offramp_server.api.open_inference.request import ROUTING_PARAMETERS

_OBJECT: Final = {"type": "object"}
_SERVER_EXAMPLE: Final = {"name": "offramp", "version": "0.1.0", "extensions": ["binary_tensor_data", "classification"]}
_MODEL_EXAMPLE: Final = {
    "name": "digits",
    "versions": ["3f9c01a4be77"],
    "platform": "onnxruntime_onnx",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 1, 8, 8]}],
    "outputs": [
        {"name": name, "datatype": DATATYPE_OF[name], "shape": [-1, 10 if name in ("logits", "probabilities") else 1]}
        for name in OUTPUTS
    ],
}
_CONFIGURATION_EXAMPLE: Final = {
    "name": "digits",
    "platform": "onnxruntime_onnx",
    "backend": "onnxruntime",
    "max_batch_size": 256,
    "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [1, 8, 8]}],
    "output": [{"name": "class_id", "data_type": "TYPE_INT32", "dims": [1]}],
    "dynamic_batching": {},
    "parameters": {},
}
_REQUEST_EXAMPLE: Final = {
    "id": "42",
    "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [0.0, 9.0, 0.0, 0.0]}],
    "outputs": [{"name": "probabilities", "parameters": {"classification": 2}}, {"name": "exit_index"}],
    "parameters": {"policy": "confidence", "threshold": 0.9, "latency_ms": 20},
}
_ANSWER_EXAMPLE: Final = {
    "model_name": "digits",
    "model_version": "3f9c01a4be77",
    "id": "42",
    "outputs": [
        {"name": "probabilities", "datatype": "BYTES", "shape": [1, 2], "data": ["0.999630:1:one", "0.000123:0:zero"]},
        {"name": "exit_index", "datatype": "INT32", "shape": [1, 1], "data": [0]},
    ],
}
_INDEX_EXAMPLE: Final = [{"name": "digits", "version": "3f9c01a4be77", "state": "READY", "reason": ""}]
_REQUEST_SCHEMA: Final = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string", "description": "Echoed in the answer."},
        "inputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype"],
                "properties": {
                    "name": {"type": "string"},
                    "shape": {"type": "array", "items": {"type": "integer"}, "description": "The batch first."},
                    "datatype": {
                        "enum": ["BOOL", "UINT8", "INT8", "INT32", "INT64", "FP16", "FP32", "FP64"],
                        "description": "The model's own; nothing is converted.",
                    },
                    "data": {"type": "array", "description": "Flat, or nested as the shape says."},
                    "parameters": {"type": "object", "properties": {"binary_data_size": {"type": "integer"}}},
                },
            },
        },
        "outputs": {
            "type": "array",
            "description": "Unset: all but `probabilities`.",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"enum": list(OUTPUTS)},
                    "parameters": {
                        "type": "object",
                        "properties": {
                            "binary_data": {"type": "boolean"},
                            "classification": {
                                "type": "integer",
                                "description": "Give so many leading classes as `score:index:label`.",
                            },
                        },
                    },
                },
            },
        },
        "parameters": {
            "type": "object",
            "description": f"How rows are routed ({', '.join(ROUTING_PARAMETERS)}: as in /v1, numbers or text), "
            "`timeout` (a deadline in microseconds) and `binary_data_output`.",
        },
    },
}
_STATUS: Final = {
    "400": "The request cannot be read.",
    "401": "The operator asks for an API key, and it is missing or wrong.",
    "403": "The operator has switched this off.",
    "404": "No model of that name or version is served.",
    "408": "The body did not arrive in time.",
    "413": "The body or the number of rows is over the operator's limit.",
    "415": "The content encoding is not read here.",
    "422": "A value the model cannot honour; the sentence names the field and what is allowed.",
    "429": "More work than the server can promise to do; `Retry-After` says when to come back.",
    "500": "A stage of the model failed, or the server did.",
    "503": "The server or the model is loading or draining, or its engine has died.",
    "504": "The deadline passed before any exit could answer, and `on_miss` is `reject`.",
}
_ERROR: Final = {
    "application/json": {
        "schema": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}},
        "example": {"error": "inputs.x.datatype: must be FP32"},
    }
}


def openapi_paths() -> dict[str, Any]:
    """Give the OpenAPI path items of every route under `/v2`."""
    paths = {
        "/v2": _get("v2_server", "What this server is and can", _SERVER_EXAMPLE, ("401",)),
        "/v2/health/live": _get("v2_live", "Whether the engine runs", {"live": True}, ("503",), is_open=True),
        "/v2/health/ready": _get("v2_ready", "Whether requests are admitted", {"ready": True}, ("503",), is_open=True),
        "/v2/models/stats": _get("v2_all_stats", "What every model has done", {"model_stats": []}, ("401",)),
    }
    described = {
        "": ("v2_model", "What a model reads and gives", _MODEL_EXAMPLE),
        "/ready": ("v2_model_ready", "Whether a model's requests are admitted", {"name": "digits", "ready": True}),
        "/config": ("v2_model_config", "A model's configuration, in Triton's form", _CONFIGURATION_EXAMPLE),
        "/stats": ("v2_model_stats", "What a model has done since it was loaded", {"model_stats": []}),
    }
    for which in ("", "/versions/{version}"):
        name = "_version" if which else ""
        for suffix, (operation_id, summary, example) in described.items():
            path = f"/v2/models/{{model}}{which}{suffix}"
            paths[path] = _get(operation_id + name, summary, example, ("401", "404", "503"), path)
        path = f"/v2/models/{{model}}{which}/infer"
        paths[path] = {"post": _infer(path, f"v2_infer{name}")}
    return paths | _repository_paths()


def _get(
    operation_id: str, summary: str, example: Any, errors: tuple[str, ...], path: str = "", *, is_open: bool = False
) -> dict[str, Any]:
    operation = {
        "tags": ["open inference"],
        "operationId": operation_id,
        "summary": summary,
        "parameters": _path_parameters(path),
        "responses": {"200": _answer(summary, _OBJECT, example), **_errors(*errors, "500")},
    }
    return {"get": operation | ({"security": []} if is_open else {})}


def _infer(path: str, operation_id: str) -> dict[str, Any]:
    binary = {
        "schema": {"type": "string", "format": "binary"},
    }
    answer = _answer("The outputs, as JSON and, where they were asked for so, as binary data behind it.", _OBJECT,
                     _ANSWER_EXAMPLE)  # fmt: skip
    answer["content"]["application/octet-stream"] = binary
    return {
        "tags": ["open inference"],
        "operationId": operation_id,
        "summary": "Infer with tensors",
        "description": "Tensors as JSON or, behind the JSON, as binary data; `Inference-Header-Content-Length` says "
        "where that begins. A row that fails fails the request.",
        "parameters": [
            *_path_parameters(path),
            {
                "name": "Inference-Header-Content-Length",
                "in": "header",
                "description": "Bytes of JSON before the binary data; unset where there is none.",
                "schema": {"type": "integer", "minimum": 1},
            },
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _REQUEST_SCHEMA, "example": _REQUEST_EXAMPLE},
                "application/octet-stream": binary,
            },
        },
        "responses": {
            "200": answer,
            **_errors("400", "401", "404", "408", "413", "415", "422", "429", "500", "503", "504"),
        },
    }


def _repository_paths() -> dict[str, Any]:
    index = _control("v2_index", "The repository's models and their state", {"ready": {"type": "boolean"}}, ())
    index["responses"]["200"] = _answer("Every model, served or not.", {"type": "array"}, _INDEX_EXAMPLE)
    load = _control("v2_load", "Load a model or its newest version", {"parameters": _OBJECT}, ("403", "404", "503"))
    unload = _control("v2_unload", "Stop serving a model", {"parameters": _OBJECT}, ("403", "404"))
    for operation in (load, unload):
        operation["parameters"] = _path_parameters("{model}")
    return {
        "/v2/repository/index": {"post": index},
        "/v2/repository/models/{model}/load": {"post": load},
        "/v2/repository/models/{model}/unload": {"post": unload},
    }


def _control(operation_id: str, summary: str, properties: dict[str, Any], errors: tuple[str, ...]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties}
    return {
        "tags": ["open inference"],
        "operationId": operation_id,
        "summary": summary,
        "requestBody": {"required": False, "content": {"application/json": {"schema": schema}}},
        "responses": {
            "200": _answer(summary, _OBJECT, {}),
            **_errors("400", "401", "408", "413", "415", "422", "500", *errors),
        },
    }


def _path_parameters(path: str) -> list[dict[str, Any]]:
    described = {"model": ("A served model's name.", "digits"), "version": ("Its served version.", "3f9c01a4be77")}
    return [
        {"name": name, "in": "path", "required": True, "description": about, "schema": {"type": "string"},
         "example": example}
        for name, (about, example) in described.items()
        if f"{{{name}}}" in path
    ]  # fmt: skip


def _answer(description: str, schema: dict[str, Any], example: Any) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema, "example": example}}}


def _errors(*statuses: str) -> dict[str, Any]:
    return {status: {"description": _STATUS[status], "content": _ERROR} for status in sorted(statuses)}
