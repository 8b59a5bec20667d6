from typing import Any

import httpx
import orjson
import schemathesis
from hypothesis import HealthCheck, settings
from offramp_server.api.openapi import openapi_document
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
BOUNDED = settings(
    max_examples=15, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
DOCUMENT = schemathesis.openapi.from_dict(openapi_document()).include(path_regex="^/v2")


@DOCUMENT.parametrize()
@BOUNDED
def test_whatever_the_document_allows_gets_a_status_and_a_body_it_describes(case: Any, toy: Any) -> None:
    if "model" in (case.path_parameters or {}):
        case.path_parameters["model"] = "toy"
    case.call_and_validate(base_url=toy.url, checks=CHECKS)


def test_the_documents_example_of_a_request_is_answered(toy: Any) -> None:
    operation = openapi_document()["paths"]["/v2/models/{model}/infer"]["post"]
    example = operation["requestBody"]["content"]["application/json"]["example"]
    answer: httpx.Response = toy.client.post("/v2/models/toy/infer", content=orjson.dumps(example))
    assert answer.status_code == 200
    described = operation["responses"]["200"]["content"]["application/json"]["example"]
    assert [output["name"] for output in answer.json()["outputs"]] == [o["name"] for o in described["outputs"]]
    assert answer.json().keys() == described.keys()
