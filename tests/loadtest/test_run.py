import asyncio
import json
import threading

import numpy as np
import pytest
from aiohttp import web
from offramp_loadtest import LoadTestError, measure_capacity, payloads_of_arrays, render, run, scenario_of
from rich.console import Console

PAYLOADS = payloads_of_arrays(np.arange(20, dtype=np.float32).reshape(5, 4), [0, 1, 2, 3, 0])


def scenario(rate, seconds, **changes):
    return scenario_of({"phases": [{"rate": rate, "seconds": seconds}]} | changes)


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
        plan = scenario(200, 0.5, model="m", fields={"policy": "entropy", "latency_ms": 5000})
        summary = run(url, plan, PAYLOADS).summary
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
        summary = run(url, scenario(300, 0.6, warm_up=0), PAYLOADS).summary
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
        summary = run(f"{url}/behind/", scenario(50, 0.3, warm_up=0), PAYLOADS).summary
    assert paths == {"/behind/v1/classify"}
    assert summary.outcomes["error"] == summary.arrivals


def test_an_answer_that_never_comes_is_a_timeout(scripted_server):
    async def handler(request):
        await asyncio.Event().wait()

    with scripted_server(handler) as url:
        summary = run(url, scenario(20, 0.3, warm_up=0, timeout_s=0.05), PAYLOADS).summary
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
        plan = scenario(20, 0.4, warm_up=0, connections=1, arrivals={"kind": "fixed"})
        summary = run(url, plan, PAYLOADS, on_progress=let_go_when_all_are_due).summary
    assert summary.outcomes["ok"] == summary.arrivals
    # The first request was due at 50 ms and no answer came before 500 ms; the last was due at 350 ms.
    assert summary.latency_ms["max"] >= 450
    assert summary.latency_ms["p50"] >= 150
    # The server was not slow: the limit of connections was, and the summary says so.
    assert summary.connection_wait_ms["p50"] >= 150
    assert any("All connections were in use" in note for note in summary.notes)


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
        plan = scenario(100, 0.3, model="m", api="v2", fields={"policy": "margin"})
        summary = run(url, plan, PAYLOADS).summary
    assert summary.accuracy == 1.0
    assert summary.exits == {"exit_2": summary.arrivals}
    assert summary.reasons == {"margin": summary.arrivals}
    assert summary.mean_depth == 0.5


def test_a_server_that_cannot_be_asked_ends_the_run_before_it_begins(scripted_server):
    async def handler(request):
        return web.Response(status=404, text="no such path")

    with scripted_server(handler) as url:
        with pytest.raises(LoadTestError, match="does not answer what it is asked: 404 no such path"):
            run(url, scenario(10, 1), PAYLOADS)
        with pytest.raises(LoadTestError, match="does not describe a model"):
            run(url, scenario(10, 1, model="m", api="v2"), PAYLOADS)


@pytest.mark.parametrize(
    ("url", "headers", "sentence"),
    [
        ("ftp://x", {}, "must be http"),
        ("http://host:99999", {}, "must be http"),
        ("http://host:80/a b", {}, "must be http"),
        ("http://127.0.0.1:1", {"x-key": "a\r\nb: c"}, "headers: must be of one line"),
        ("http://127.0.0.1:1", {}, "does not answer"),
    ],
)
def test_an_address_that_cannot_be_asked_is_refused_in_a_sentence(url, headers, sentence):
    with pytest.raises(LoadTestError, match=sentence):
        run(url, scenario(10, 1), PAYLOADS, headers=headers)


def test_the_report_shows_goodput_percentiles_and_a_bar_per_exit(scripted_server):
    async def handler(request):
        await request.read()
        return web.json_response(prediction(forced=True))

    with scripted_server(handler) as url:
        summary = run(url, scenario(50, 0.3, slo_ms=1000.0), PAYLOADS).summary
    console = Console(record=True, width=100)
    console.print(render(summary))
    text = console.export_text()
    for word in ("correct goodput", "p99.9", "exit_0", "█", "forced exits", "100.0%"):
        assert word in text


def test_a_v2_server_without_exits_is_reported_without_what_it_does_not_tell(scripted_server):
    async def handler(request):
        if request.method == "GET":
            return web.json_response({"inputs": [{"name": "x", "datatype": "FP32"}]})
        (tensor,) = (await request.json())["inputs"]
        scores = [float(index == int(tensor["data"][0]) // 4 % 4) for index in range(4)]
        output = {"name": "scores", "datatype": "FP32", "shape": [1, 4], "data": scores}
        return web.json_response({"outputs": [output]})

    with scripted_server(handler) as url:
        plan = scenario(100, 0.3, model="m", api="v2", body="json", slo_ms=5000.0)
        summary = run(url, plan, PAYLOADS).summary
    assert summary.accuracy == summary.attainment == 1.0
    assert summary.forced is summary.mean_depth is summary.server is None
    assert summary.exits == summary.reasons == summary.gears == summary.queue_ms == summary.compute_ms == {}


def test_the_gear_of_an_answer_is_read_from_either_api(scripted_server):
    async def handler(request):
        if request.method == "GET":
            return web.json_response({"inputs": [{"name": "x", "datatype": "FP32"}]})
        await request.read()
        if request.path.startswith("/v1"):
            return web.json_response(prediction() | {"policy": {"kind": "confidence", "gear": 2}})
        output = {"name": "logits", "datatype": "FP32", "shape": [1, 2], "data": [0.0, 1.0]}
        return web.json_response({"outputs": [output]}, headers={"x-gear": "3", "x-queue-time-ms": "0.250"})

    with scripted_server(handler) as url:
        first = run(url, scenario(50, 0.2), PAYLOADS).summary
        second = run(url, scenario(50, 0.2, model="m", api="v2"), PAYLOADS).summary
    assert first.gears == {"2": first.arrivals}
    assert second.gears == {"3": second.arrivals}
    assert second.queue_ms["max"] == 0.25


def test_clients_that_leave_and_bad_requests_have_a_record_each_and_are_no_misses(scripted_server):
    left = []

    async def handler(request):
        body = await request.read()
        if len(body) < len(PAYLOADS[0].npy()):
            return web.json_response({}, status=400)
        if request.content_type != "application/x-npy":
            return web.json_response({}, status=415)
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            left.append(True)
            raise
        return web.json_response(prediction())

    disturbance = {"disconnect_share": 0.3, "disconnect_within_ms": 20.0, "bad_share": 0.3}
    with scripted_server(handler) as url:
        plan = scenario(300, 0.5, warm_up=0, slo_ms=5000.0, disturbance=disturbance)
        test = run(url, plan, PAYLOADS)
    outcomes = test.summary.outcomes
    assert sum(outcomes.values()) == test.summary.arrivals == len(test.records)
    assert outcomes["left"] > 20
    assert outcomes["invalid"] > 20
    assert outcomes["ok"] == test.summary.asked == test.summary.arrivals - outcomes["left"] - outcomes["invalid"]
    assert test.summary.attainment == 1.0


def test_a_bad_request_that_is_answered_is_an_error(scripted_server):
    async def handler(request):
        await request.read()
        return web.json_response(prediction())

    with scripted_server(handler) as url:
        plan = scenario(50, 0.2, warm_up=0, disturbance={"bad_share": 1.0})
        summary = run(url, plan, PAYLOADS).summary
    assert summary.outcomes["error"] == summary.arrivals
    assert summary.asked == 0


def test_the_servers_own_count_over_the_run_stands_beside_the_clients(scripted_server):
    counted = {"ok": 100.0, "rows": 40.0, "dispatches": 10.0}

    async def handler(request):
        if request.path == "/metrics":
            labels = 'model="m",version="1"'
            lines = [
                f'offramp_requests_total{{{labels},outcome="ok"}} {counted["ok"]}',
                'offramp_requests_total{model="other",version="1",outcome="ok"} 7.0',
                f'offramp_stage_batch_size_bucket{{{labels},stage="s0",le="4.0"}} {counted["dispatches"]}',
                f'offramp_stage_batch_size_bucket{{{labels},stage="s0",le="+Inf"}} {counted["dispatches"]}',
                f'offramp_stage_batch_size_sum{{{labels},stage="s0"}} {counted["rows"]}',
                f'offramp_stage_batch_size_count{{{labels},stage="s0"}} {counted["dispatches"]}',
                f"offramp_inflight_samples{{{labels}}} 0.0",
            ]
            return web.Response(text="# HELP x y\n" + "\n".join(lines) + "\n")
        await request.read()
        counted["ok"] += 1
        counted["rows"] += 4
        counted["dispatches"] += 1
        return web.json_response(prediction())

    with scripted_server(handler, has_metrics=True) as url:
        summary = run(url, scenario(100, 0.3, model="m"), PAYLOADS).summary
    assert summary.server.requests == {"ok": summary.arrivals}
    assert summary.server.stages["s0"].mean_rows == 4.0
    assert summary.server.stages["s0"].at_most == {"4": summary.arrivals}
    assert not [note for note in summary.notes if "counts" in note]


def test_capacity_is_what_is_answered_with_requests_always_in_flight_at_the_deepest_exit(scripted_server):
    seen, inflight, most = set(), [], []

    async def handler(request):
        if request.method == "GET":
            return web.json_response({"exits": [{}, {}, {}]})
        await request.read()
        seen.add(tuple(sorted(request.query.items())))
        inflight.append(1)
        most.append(len(inflight))
        await asyncio.sleep(0.02)
        inflight.pop()
        return web.json_response(prediction())

    with scripted_server(handler) as url:
        plan = scenario(1, 1, model="m", fields={"policy": "entropy", "latency_ms": 5, "top_k": 2})
        capacity = measure_capacity(url, plan, PAYLOADS, seconds=0.5, clients=8)
    assert seen == {(("policy", '{"kind": "fixed", "exit": 2}'), ("top_k", "2"))}
    assert max(most) == 8
    assert 0 < capacity <= 8 / 0.02


def test_a_server_that_refuses_at_capacity_has_none(scripted_server):
    async def handler(request):
        await request.read()
        return web.json_response({}, status=429)

    with scripted_server(handler) as url, pytest.raises(LoadTestError, match="capacity: the server answers 429"):
        measure_capacity(url, scenario(1, 1), PAYLOADS, fields={}, seconds=0.2, clients=2)


def test_headers_are_sent_and_stand_in_no_record_of_the_run(scripted_server):
    async def handler(request):
        await request.read()
        return web.json_response(prediction()) if request.headers.get("x-key") == "secret" else web.Response(status=401)

    with scripted_server(handler) as url:
        with_password = url.replace("http://", "http://me:secret@")
        test = run(with_password, scenario(50, 0.2), PAYLOADS, headers={"x-key": "secret"})
    assert test.summary.outcomes["ok"] == test.summary.arrivals
    assert "secret" not in repr(test)
