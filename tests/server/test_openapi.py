import io
from typing import Any

import numpy as np
import schemathesis
from hypothesis import HealthCheck, settings
from offramp_server.api.openapi import openapi_document
from offramp_server.api.schemas import ClassifyAnswer, ClassifyRequest
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
BOUNDED = settings(
    max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


@schemathesis.serializer("application/x-npy")
def as_npy(context: Any, value: Any) -> bytes:
    """Send what schemathesis makes up for a binary body: now and then behind a header that is right."""
    data = value if isinstance(value, bytes) else getattr(value, "data", b"")
    return data if len(data) % 2 else npy_around(data)


def npy_around(data: bytes) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.frombuffer(data, dtype=np.uint8))
    return stream.getvalue()


DOCUMENT = schemathesis.openapi.from_dict(openapi_document())
IMAGES = DOCUMENT.include(path_regex="^/v1/classify")


@DOCUMENT.parametrize()
@BOUNDED
def test_whatever_the_document_allows_gets_a_status_and_a_body_it_describes(case: Any, toy: Any) -> None:
    case.call_and_validate(base_url=toy.url, checks=CHECKS)


@IMAGES.parametrize()
@BOUNDED
def test_the_same_holds_for_a_model_of_images(case: Any, digits: Any) -> None:
    case.call_and_validate(base_url=digits.url, checks=CHECKS)


def test_the_document_is_valid_openapi_and_describes_every_route(toy: Any) -> None:
    document = toy.client.get("/openapi.json").json()
    schemathesis.openapi.from_dict(document).validate()
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    routes = {
        (route.path, method)
        for route in toy.app.router.routes
        for method in (getattr(route, "methods", None) or ())
        if method != "HEAD" and route.path.startswith(("/v1", "/v2", "/metrics"))
    }
    assert {(path.replace("{model:path}", "{model}"), method) for path, method in routes} == described


def test_the_examples_of_answers_are_what_the_schema_says(toy: Any) -> None:
    operation = openapi_document()["paths"]["/v1/classify"]["post"]
    ClassifyAnswer.model_validate(operation["responses"]["200"]["content"]["application/json"]["example"])
    for example in operation["requestBody"]["content"]["application/json"]["examples"].values():
        ClassifyRequest.model_validate(example["value"])


def test_real_answers_are_what_the_schema_says(toy: Any) -> None:
    body = {"inputs": [[0, 9, 0, 0], [1, 0, 0, 0]], "explain": True, "latency_ms": 500}
    ClassifyAnswer.model_validate(toy.client.post("/v1/classify", json=body).json())
