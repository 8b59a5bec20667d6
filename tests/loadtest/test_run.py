import asyncio
import json
import threading

import numpy as np
import pytest
from aiohttp import web
from offramp_loadtest import LoadPlan, LoadTestError, payloads_of_arrays, render, run
from rich.console import Console

PAYLOADS = payloads_of_arrays(np.arange(20, dtype=np.float32).reshape(5, 4), [0, 1, 2, 3, 0])


def prediction(class_id=0, exit_name="exit_0", forced=False, depth=0.25):
    answer = {
        "class_id": class_id,
        "exit": {"name": exit_name, "reason": "deadline" if forced else "confident", "forced": forced},
        "depth": depth,
    }
    return {"predictions": [answer], "timing": {"queue_ms": 0.5, "compute_ms": 1.5}}


def test_a_run_asks_every_payload_over_v1_and_reads_what_the_server_tells(scripted_server):
    asked = []

    async def handler(request):
        row = np.frombuffer(await request.read(), dtype=np.float32)[-4:]
        asked.append((request.path, dict(request.query), request.headers["content-type"]))
        return web.json_response(prediction(class_id=int(row[0]) // 4 % 4))

    with scripted_server(handler) as url:
        plan = LoadPlan(url, rate=200, seconds=0.5, model="m", fields={"policy": "entropy", "latency_ms": "5000"})
        summary = run(plan, PAYLOADS)
    assert summary.outcomes["ok"] == summary.arrivals == len(asked) - plan.warm_up
    assert set(map(str, asked)) == {
        str(("/v1/models/m/classify", {"policy": "entropy", "latency_ms": "5000"}, "application/x-npy"))
    }
    assert summary.accuracy == 1.0
    assert summary.attainment == 1.0
    assert summary.exits == {"exit_0": summary.arrivals}
    assert summary.mean_depth == 0.25
    assert summary.queue_ms["p50"] == 0.5
    assert summary.compute_ms["max"] == 1.5


def test_outcomes_add_up_to_the_arrivals_whatever_the_server_does(scripted_server):
    number = iter(range(10**6))

    async def handler(request):
        await request.read()
        match next(number) % 6:
            case 0:
                return web.json_response(prediction())
            case 1:
                return web.json_response({}, status=429)
            case 2:
                return web.json_response({}, status=504)
            case 3:
                return web.Response(status=500)
            case 4:
                return web.json_response({"unexpected": "shape"})
            case _:
                request.transport.abort()
                return web.Response()

    with scripted_server(handler) as url:
        summary = run(LoadPlan(url, rate=300, seconds=0.6, warm_up=0), PAYLOADS)
    assert sum(summary.outcomes.values()) == summary.arrivals
    assert all(summary.outcomes[name] for name in ("ok", "rejected", "deadline", "error"))
    assert summary.outcomes["timeout"] == 0


def test_a_server_behind_a_path_is_asked_under_it_and_only_429_counts_as_rejected(scripted_server):
    paths = set()

    async def handler(request):
        await request.read()
        paths.add(request.path)
        return web.json_response({}, status=503)

    with scripted_server(handler) as url:
        summary = run(LoadPlan(f"{url}/behind/", rate=50, seconds=0.3, warm_up=0), PAYLOADS)
    assert paths == {"/behind/v1/classify"}
    assert summary.outcomes["error"] == summary.arrivals


def test_an_answer_that_never_comes_is_a_timeout(scripted_server):
    async def handler(request):
        await asyncio.Event().wait()

    with scripted_server(handler) as url:
        summary = run(LoadPlan(url, rate=20, seconds=0.3, warm_up=0, timeout_s=0.05), PAYLOADS)
    assert summary.outcomes["timeout"] == summary.arrivals > 0


def test_waiting_for_a_free_connection_counts_as_latency(scripted_server):
    """One connection and a server that holds the first answer back until the last request is due."""
    release = threading.Event()
    held = []

    async def handler(request):
        await request.read()
        if not held:
            held.append(True)
            await asyncio.to_thread(release.wait, 10)
        return web.json_response(prediction())

    def let_go_when_all_are_due(progress):
        if progress.elapsed_s > 0.5:
            release.set()

    with scripted_server(handler) as url:
        plan = LoadPlan(url, rate=20, seconds=0.4, warm_up=0, max_inflight=1, arrivals="fixed")
        summary = run(plan, PAYLOADS, let_go_when_all_are_due)
    assert summary.outcomes["ok"] == summary.arrivals
    # The first request was due at 50 ms and no answer came before 500 ms; the last was due at 350 ms.
    assert summary.latency_ms["max"] >= 450
    assert summary.latency_ms["p50"] >= 150
    # The server was not slow: the client's own limit was, and says so.
    assert summary.client_lag_ms["p50"] >= 150


def test_v2_sends_binary_tensors_and_reads_class_exit_and_depth(scripted_server):
    async def handler(request):
        if request.method == "GET":
            return web.json_response({"inputs": [{"name": "pixels", "datatype": "FP32"}]})
        body = await request.read()
        length = int(request.headers["inference-header-content-length"])
        header = json.loads(body[:length])
        assert header["parameters"]["policy"] == "margin"
        assert header["inputs"][0]["name"] == "pixels"
        row = np.frombuffer(body[length:], dtype=np.float32)
        logits = np.eye(4, dtype=np.float32)[int(row[0]) // 4 % 4][None]
        reason = len(b"margin").to_bytes(4, "little") + b"margin"
        outputs = [
            {"name": "logits", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}},
            {"name": "exit_reason", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(reason)}},
            {"name": "exit_index", "datatype": "INT32", "shape": [1], "data": [2]},
            {"name": "depth", "datatype": "FP32", "shape": [1], "data": [0.5]},
        ]
        written = json.dumps({"outputs": outputs}).encode()
        headers = {"inference-header-content-length": str(len(written))}
        return web.Response(body=written + logits.tobytes() + reason, headers=headers)

    with scripted_server(handler) as url:
        plan = LoadPlan(url, rate=100, seconds=0.3, model="m", api="v2", fields={"policy": "margin"})
        summary = run(plan, PAYLOADS)
    assert summary.accuracy == 1.0
    assert summary.exits == {"exit_2": summary.arrivals}
    assert summary.reasons == {"margin": summary.arrivals}
    assert summary.mean_depth == 0.5


def test_a_server_that_cannot_be_asked_ends_the_run_before_it_begins(scripted_server):
    async def handler(request):
        return web.Response(status=404, text="no such path")

    with scripted_server(handler) as url:
        with pytest.raises(LoadTestError, match="does not answer what it is asked: 404 no such path"):
            run(LoadPlan(url, rate=10, seconds=1), PAYLOADS)
        with pytest.raises(LoadTestError, match="does not describe a model"):
            run(LoadPlan(url, rate=10, seconds=1, model="m", api="v2"), PAYLOADS)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"url": "ftp://x"}, "must be http"),
        ({"url": "http://host:99999"}, "must be http"),
        ({"slo_ms": -1.0}, "must be above 0"),
        ({"fields": {"latency_ms": "soon"}}, "latency_ms: must be a number"),
        ({"headers": {"x-key": "a\r\nb: c"}}, "headers: must be of one line"),
        ({"rate": 0.0}, "rate, seconds: must be above 0"),
        ({"rate": 1e6, "seconds": 60.0}, "at most 1000000 requests"),
        ({"timeout_s": 0.0}, "timeout_s must be above 0"),
        ({"max_inflight": 0}, "max_inflight at least 1"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_in_a_sentence(change, sentence):
    with pytest.raises(LoadTestError, match=sentence):
        LoadPlan(**({"url": "http://127.0.0.1:1", "rate": 10.0, "seconds": 1.0} | change))


def test_the_report_shows_goodput_percentiles_and_a_bar_per_exit(scripted_server):
    async def handler(request):
        await request.read()
        return web.json_response(prediction(forced=True))

    with scripted_server(handler) as url:
        summary = run(LoadPlan(url, rate=50, seconds=0.3, slo_ms=1000.0), PAYLOADS)
    console = Console(record=True, width=100)
    console.print(render(summary))
    text = console.export_text()
    for word in ("correct goodput", "p99.9", "exit_0", "█", "forced exits", "100.0%"):
        assert word in text
