import logging
from typing import Any

import pytest

KEY = "correct-horse-battery"
BODY = {"inputs": [0.0, 9.0, 0.0, 0.0]}


@pytest.fixture(scope="module")
def guarded(serve: Any, toy_bundle: Any) -> Any:
    return serve(toy_bundle, api_key=KEY)


@pytest.mark.parametrize(
    "headers", [{"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {KEY}"}, {"x-api-key": KEY}]
)
def test_the_key_lets_in_either_way(guarded: Any, headers: dict[str, str]) -> None:
    assert guarded.client.post("/v1/classify", json=BODY, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
        {"x-api-key": KEY[:-1]},
        {"x-api-key": "clé".encode()},
    ],
)
def test_without_the_key_nothing_is_answered(guarded: Any, headers: dict[str, Any]) -> None:
    for path in ("/v1/classify", "/v1/models/nobody/classify"):
        response = guarded.client.post(path, json=BODY, headers=headers)
        assert response.status_code == 401
        assert response.json()["type"] == "/problems/unauthorized"
        assert response.headers["www-authenticate"] == "Bearer"
        assert KEY not in response.text
    assert guarded.client.get("/v2/models/toy", headers=headers).status_code == 401
    assert set(guarded.client.get("/v2/models/toy", headers=headers).json()) == {"error"}


@pytest.mark.parametrize("path", ["/metrics", "/docs", "/docs/assets/swagger-ui.css", "/openapi.json"])
def test_probes_scrapers_and_documentation_need_no_key(guarded: Any, path: str) -> None:
    assert guarded.client.get(path).status_code == 200


def test_the_key_appears_in_no_log_and_no_setting_that_is_shown(
    guarded: Any, caplog: pytest.LogCaptureFixture, serve: Any
) -> None:
    from offramp_server.settings import ServerSettings

    with caplog.at_level(logging.DEBUG):
        guarded.client.post("/v1/classify", json=BODY, headers={"x-api-key": KEY})
        guarded.client.post("/v1/classify", json=BODY, headers={"x-api-key": f"{KEY}-but-wrong"})
    assert KEY not in caplog.text
    assert KEY not in repr(ServerSettings.load(api_key=KEY))


def test_an_unexpected_exception_is_logged_with_the_request_id_and_its_text_stays_inside(
    serve: Any, toy_bundle: Any, caplog: pytest.LogCaptureFixture
) -> None:
    running = serve(toy_bundle)
    context = running.app.state.context
    running.app.state.context = None  # a bug in the server
    try:
        with caplog.at_level(logging.ERROR):
            response = running.client.get("/v1/models", headers={"x-request-id": "req-500"})
    finally:
        running.app.state.context = context
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "req-500"
    assert response.json()["type"] == "/problems/internal"
    assert "NoneType" not in response.text
    assert "req-500" in caplog.text
    assert running.client.get("/v1/models").status_code == 200
