import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from offramp_server.messages import NoObserver, RequestDone, StageRun

UNSURE = [0.01, 0.0, 0.0, 0.0]
"""Not confident at any exit but the last."""


class Gate(NoObserver):
    """Holds the engine's thread after a stage until the test lets it go on, and remembers what happened."""

    __slots__ = ("done", "ended", "go_on", "held_after", "is_held", "stages")

    def __init__(self, held_after: str | None) -> None:
        object.__setattr__(self, "held_after", held_after)
        object.__setattr__(self, "is_held", threading.Event())
        object.__setattr__(self, "go_on", threading.Event())
        object.__setattr__(self, "ended", threading.Event())
        object.__setattr__(self, "stages", [])
        object.__setattr__(self, "done", [])

    def stage_ran(self, run: StageRun) -> None:
        self.stages.append(run.stage)
        if run.stage == self.held_after:
            self.is_held.set()
            self.go_on.wait(30)

    def request_done(self, done: RequestDone) -> None:
        self.done.append(done)
        self.ended.set()


def events_of(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    kind = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, orjson.loads(line.removeprefix("data: "))


def ask(client: httpx.Client, **fields: Any) -> Any:
    body = {"inputs": UNSURE, "threshold": 1.0} | fields
    return client.stream("POST", "/v1/classify", json=body, headers={"accept": "text/event-stream"})


def test_every_exit_reached_is_an_event_and_the_answer_is_the_last(toy: Any) -> None:
    with ask(toy.client) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        events = list(events_of(response))
    assert [kind for kind, _ in events] == ["exit", "exit", "answer"]
    assert [event["exit"]["index"] for _, event in events[:2]] == [0, 1]
    assert events[0][1]["row"] == 0
    answer = events[2][1]
    assert answer["predictions"][0]["exit"]["reason"] == "final"
    whole = toy.client.post("/v1/classify", json={"inputs": UNSURE, "threshold": 1.0}).json()
    assert answer.keys() == whole.keys()


def test_rows_of_a_batch_are_told_apart(toy: Any) -> None:
    with ask(toy.client, inputs=[[0.0, 9.0, 0.0, 0.0], UNSURE], threshold=0.9) as response:
        events = list(events_of(response))
    assert [(kind, event["row"]) for kind, event in events[:-1]] == [("exit", 1), ("exit", 1)]
    assert len(events[-1][1]["predictions"]) == 2


def test_a_refused_request_is_a_status_and_not_a_stream(toy: Any) -> None:
    with ask(toy.client, threshold=7) as response:
        assert response.status_code == 422
        assert orjson.loads(response.read())["type"] == "/problems/invalid-value"


def test_a_stream_whose_row_fails_ends_with_the_problem(toy: Any) -> None:
    overflowing = {"inputs": [1e37, 0.0, 0.0, 0.0], "threshold": None, "policy": {"kind": "fixed", "exit": 2}}
    with ask(toy.client, **overflowing) as response:
        events = list(events_of(response))
    assert [kind for kind, _ in events] == ["exit", "exit", "error"]
    assert (events[2][1]["type"], events[2][1]["status"]) == ("/problems/not-finite", 422)


def test_an_answer_is_sent_when_its_exit_is_reached_and_not_at_the_end(serve: Any, toy_bundle: Path) -> None:
    gate = Gate(held_after="stage_1")
    running = serve(toy_bundle, observer=gate)
    with ask(running.client, latency_ms=60_000) as response:
        events = events_of(response)
        kind, event = next(events)
        assert (kind, event["exit"]["index"]) == ("exit", 0)
        assert gate.is_held.wait(30)
        assert "stage_2" not in gate.stages
        gate.go_on.set()
        assert [kind for kind, _ in events] == ["exit", "answer"]


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_a_client_that_leaves_frees_its_work_at_the_next_stage_boundary(
    serve: Callable[..., Any], toy_bundle: Path, accept: str
) -> None:
    gate = Gate(held_after="stage_0")
    running = serve(toy_bundle, observer=gate)
    body = orjson.dumps({"inputs": UNSURE, "threshold": 1.0, "latency_ms": 60_000})
    with running.connect() as connection:
        connection.sendall(
            b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"accept: %s\r\ncontent-length: %d\r\n\r\n" % (accept.encode(), len(body)) + body
        )
        assert gate.is_held.wait(30)
    running.run(running.requests_end())  # the handler has seen that its client is gone, and ended
    gate.go_on.set()
    assert gate.ended.wait(30)
    assert [done.outcome for done in gate.done] == ["cancelled"]
    assert gate.stages == ["stage_0"]
    assert running.engine.num_inflight == 0


def test_a_request_beyond_what_may_be_in_flight_gets_429_and_when_to_come_back(
    serve: Callable[..., Any], toy_bundle: Path
) -> None:
    gate = Gate(held_after="stage_1")
    running = serve(toy_bundle, observer=gate, max_inflight_samples=1)
    with ask(running.client, latency_ms=60_000) as held:
        assert gate.is_held.wait(30)
        refused = httpx.post(f"{running.url}/v1/classify", json={"inputs": UNSURE}, trust_env=False)
        gate.go_on.set()
        assert [kind for kind, _ in events_of(held)] == ["exit", "exit", "answer"]
    assert (refused.status_code, refused.json()["type"]) == (429, "/problems/overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["retry_after_s"] > 0
