"""Two workers in front of one engine answer as one process does."""

import gzip
import json
import os
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

JSON = {"content-type": "application/json"}
ROW = [0.1, 0.9, 0.3, 0.2]
NUMBERS = np.array([ROW, ROW[::-1]], np.float32)


def binary(rows, **parameters):
    """Write an inference request with binary tensors."""
    head = {
        "inputs": [
            {
                "name": "x",
                "datatype": "FP32",
                "shape": list(rows.shape),
                "parameters": {"binary_data_size": rows.nbytes},
            }
        ],
        "parameters": {"binary_data_output": True, **parameters},
    }
    text = json.dumps(head).encode()
    return text + rows.tobytes(), {"inference-header-content-length": str(len(text))}


def npy(rows):
    header = str({"descr": "<f4", "fortran_order": False, "shape": rows.shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + rows.tobytes()


def classify(**fields):
    return ("POST", "/v1/classify", JSON, json.dumps(fields).encode())


def infer(body, headers, path="/v2/models/toy/infer"):
    return ("POST", path, headers, body)


REQUESTS = {
    "rows": classify(inputs=[ROW, ROW[::-1]]),
    "explained": classify(inputs=ROW, explain=True, policy={"kind": "fixed", "exit": 2}),
    "combined": classify(inputs=ROW, combine="mean", threshold=1.0, explain=True, top_k=2),
    "by name": ("POST", "/v1/models/toy/classify?threshold=0.5", JSON, json.dumps({"inputs": ROW}).encode()),
    "npy": ("POST", "/v1/classify", {"content-type": "application/x-npy"}, npy(NUMBERS)),
    "gzip": (
        "POST",
        "/v1/classify",
        JSON | {"content-encoding": "gzip"},
        gzip.compress(json.dumps({"inputs": ROW}).encode()),
    ),
    "binary": infer(*binary(NUMBERS)),
    "binary, refused policy": infer(*binary(NUMBERS, threshold=7)),
    "v2 json": infer(
        json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": ROW}]}).encode(), JSON
    ),
    "unknown field": classify(inputs=ROW, treshold=0.5),
    "wrong shape": classify(inputs=[1, 2]),
    "no json": ("POST", "/v1/classify", JSON, b"{"),
    "too large": ("POST", "/v1/classify", JSON, b" " * 200_001),
    "too many rows": classify(inputs=[ROW] * 17),
    "no such type": ("POST", "/v1/classify", {"content-type": "text/plain"}, b"hello"),
    "unknown model": ("POST", "/v1/models/nobody/classify", JSON, b"{}"),
    "unknown model of v2": infer(b"{}", JSON, "/v2/models/nobody/infer"),
    "unknown version": infer(b"{}", JSON, "/v2/models/toy/versions/7/infer"),
    "impossible deadline": classify(inputs=ROW, latency_ms=0.0001, on_miss="reject"),
    "no such path": ("GET", "/nowhere", {}, b""),
    "no such method": ("GET", "/v1/classify", {}, b""),
    "no such method of a passed-on path": ("POST", "/v1/models", {}, b""),
    "live": ("GET", "/v2/health/live", {}, b""),
    "ready": ("GET", "/v2/health/ready", {}, b""),
    "server": ("GET", "/v2", {}, b""),
    "models": ("GET", "/v1/models", {}, b""),
    "metadata": ("GET", "/v2/models/toy", {}, b""),
    "configuration": ("GET", "/v2/models/toy/config", {}, b""),
    "operating points": ("GET", "/v1/models/toy/operating-points", {}, b""),
    "index": ("POST", "/v2/repository/index", JSON, b'{"ready": true}'),
    "unload, which is off": ("POST", "/v2/repository/models/toy/unload", {}, b""),
    "documentation": ("GET", "/docs", {}, b""),
    "documented": ("GET", "/openapi.json", {}, b""),
    "a file of the documentation": ("GET", "/docs/assets/swagger-ui.css", {}, b""),
}
TIMES = ("timing", "x-queue-time-ms", "x-compute-time-ms", "x-total-time-ms", "date", "content-length", "etag")


def answered(server, method, path, headers, body):
    """Give what an answer says but for what it took."""
    with server.client() as client:
        answer = client.request(method, path, headers=headers | {"x-request-id": "mine"}, content=body)
    said = {name: value for name, value in answer.headers.items() if name not in TIMES}
    content = answer.content
    if answer.headers.get("content-type", "").endswith("json"):
        content = answer.json()
        if isinstance(content, dict):
            content.pop("timing", None)
    return answer.status_code, said, content


@pytest.mark.parametrize("name", REQUESTS)
def test_two_workers_answer_as_one_process_does(both, name):
    alone, front = (answered(server, *REQUESTS[name]) for server in both)
    assert front == alone


def test_a_stream_of_events_is_that_of_one_process(both):
    def events(server):
        request = {"inputs": [ROW, ROW[::-1]], "policy": {"kind": "fixed", "exit": 2}}
        with server.client() as client:
            text = client.post("/v1/classify", json=request, headers={"accept": "text/event-stream"}).text
        return sorted(line.split('"timing"')[0] for line in text.splitlines() if line)

    alone, front = map(events, both)
    assert front == alone
    assert Counter(line.split(": ")[1] for line in front if line.startswith("event")) == {"exit": 4, "answer": 1}


def test_metrics_add_up_to_the_clients_own_count_whichever_worker_answers(front):
    before = front.scrape()
    kinds = ["rows"] * 30 + ["binary"] * 30 + ["unknown field"] * 15 + ["impossible deadline"] * 5
    with ThreadPoolExecutor(8) as threads:
        statuses = Counter(threads.map(lambda name: answered(front, *REQUESTS[name])[0], kinds))
    after = front.scrape()
    assert statuses == {200: 60, 422: 15, 504: 5}

    def grown(name, **labels):
        return sum(
            value - before.get(series, 0.0)
            for series, value in after.items()
            if series[0] == name and labels.items() <= dict(series[1:]).items()
        )

    outcomes = {outcome: grown("offramp_requests_total", outcome=outcome) for outcome in ("ok", "invalid", "deadline")}
    assert outcomes == {"ok": 60, "invalid": 15, "deadline": 5}
    assert grown("offramp_requests_total") == 80
    assert grown("offramp_samples_total") == grown("offramp_exit_depth_count") == 120
    assert after["offramp_http_workers",] == 2


def test_signals_of_the_terminal_reach_the_workers_and_end_none_of_them(front):
    workers = front.workers()
    for pid in workers:
        for sig in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, sig)
    assert answered(front, *REQUESTS["rows"])[0] == 200
    assert front.workers() == workers
