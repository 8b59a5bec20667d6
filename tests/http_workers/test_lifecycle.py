"""Workers come and go: models change for all of them, a crash costs one its requests, and an end is an end for all."""

import os
import select
import shutil
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

ROW = [0.1, 0.9, 0.3, 0.2]
KEY = {"x-api-key": "a long secret"}
FULL_DEPTH = {"inputs": ROW, "policy": {"kind": "fixed", "exit": 2}, "latency_ms": 60_000}


@pytest.fixture(scope="session")
def slow_bundle(make_bundle):
    """A stage takes long enough for other requests to come while it runs."""
    return make_bundle(name="slow", work=6000)


@pytest.fixture(scope="session")
def repository(serving, toy_bundle, slow_bundle, tmp_path_factory):
    """A repository of two models behind two workers, with an API key, under small limits."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(toy_bundle, folder / "toy")
    shutil.copytree(slow_bundle, folder / "slow")
    limits = ("--max-inflight-samples", "3", "--repository-poll-s", "0", "--body-timeout-s", "1")
    return serving(folder, *limits, "--repository-control", "--api-key", KEY["x-api-key"], "--http-workers", "2")


def ask(served, path="/v1/models/toy/classify", headers=KEY, **fields):
    with served.client() as client:
        return client.post(path, json={"inputs": ROW} | fields, headers=headers)


def test_unloading_and_loading_through_one_worker_is_seen_by_all_at_once(repository):
    for _ in range(3):
        assert ask(repository, "/v2/repository/models/toy/unload").status_code == 200
        assert [ask(repository).status_code for _ in range(12)] == [404] * 12
        assert ask(repository, "/v2/repository/models/toy/load").status_code == 200
        assert [ask(repository).status_code for _ in range(12)] == [200] * 12


def test_a_model_must_be_named_where_there_are_two_and_an_unknown_one_cannot_be_loaded(repository):
    assert ask(repository, "/v1/classify").status_code == 422
    assert ask(repository, "/v2/repository/models/nobody/load").status_code == 404


def test_only_who_has_the_key_is_let_in_and_probes_need_none(repository):
    assert Counter(ask(repository, headers={}).status_code for _ in range(6)) == {401: 6}
    assert ask(repository, "/v2/repository/models/toy/unload", headers={}).status_code == 401
    with repository.client() as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"authorization": f"Bearer {KEY['x-api-key']}"}).status_code == 200
        assert [client.get(path).status_code for path in ("/v2/health/ready", "/metrics", "/docs")] == [200] * 3


def test_beyond_what_may_be_in_flight_it_is_429_whichever_worker_and_every_request_has_one_answer(repository):
    with ThreadPoolExecutor(10) as threads:
        asked = [threads.submit(ask, repository, "/v1/models/slow/classify", **FULL_DEPTH) for _ in range(10)]
        answers = [one.result() for one in asked]
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses.total() == 10
    assert set(statuses) == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["retry_after_s"] > 0


@contextmanager
def begun(served, path="/v1/models/slow/classify"):
    """Ask for all exits and wait for the first; gives the lines that follow."""
    headers = KEY | {"accept": "text/event-stream"}
    with served.client() as client, client.stream("POST", path, json=FULL_DEPTH, headers=headers) as response:
        lines = response.iter_lines()
        assert next(lines) == "event: exit"
        yield lines


def test_a_client_that_leaves_frees_its_work(repository):
    def outcomes():
        return {
            dict(series[1:])["outcome"]: value
            for series, value in repository.scrape().items()
            if series[0] == "offramp_requests_total" and ("model", "slow") in series
        }

    before = outcomes()
    for _ in range(5):
        with begun(repository):
            pass
        while num_inflight(repository):
            pass
    after = outcomes()
    became = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert sum(became.values()) == 5
    assert became["cancelled"] >= 1, (
        "on a machine that stands still for a moment an answer may be ready first, not always"
    )


def num_inflight(served):
    return sum(value for series, value in served.scrape().items() if series[0] == "offramp_inflight_samples")


@pytest.fixture(scope="session")
def slow(serving, slow_bundle):
    """The slow bundle behind two workers, which end and are ended."""
    return serving(slow_bundle, "--http-workers", "2", "--max-batch", "1", "--max-wait-ms", "60000")


def test_a_crashed_worker_costs_its_own_requests_and_is_started_again(slow):
    first, second = slow.workers()
    os.kill(first, signal.SIGKILL)
    line = slow.read_log_until("an HTTP worker ended")
    assert "status -9" in line
    while slow.scrape()["offramp_http_workers",] < 2:  # connections to the one that starts wait for it
        pass
    assert slow.scrape()["offramp_http_worker_crashes_total",] == 1
    third = set(slow.workers()) - {second}
    assert len(third) == 1
    assert first not in third
    assert Counter(ask(slow, "/v1/classify").status_code for _ in range(10)) == {200: 10}
    assert num_inflight(slow) == 0


def test_told_to_stop_all_answer_what_was_admitted_and_refuse_the_rest_and_then_end(slow):
    workers = slow.workers()
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(ask, slow, "/v1/classify", **FULL_DEPTH) for _ in range(8)]
        while num_inflight(slow) < 6 and not all(one.done() for one in asked):
            pass
        slow.process.send_signal(signal.SIGTERM)
        slow.read_log_until("draining")
        refused = ask(slow, "/v1/classify")
        with slow.client() as client:
            assert client.get("/v2/health/ready").status_code == 503
        answers = Counter(one.result().status_code for one in asked)
    assert (refused.status_code, refused.json()["type"]) == (503, "/problems/not-ready")
    assert answers.total() == 8
    assert answers[200] >= 6, "what was admitted is answered"
    assert set(answers) <= {200, 503}
    assert slow.process.wait(30) == 0
    assert all(has_ended(pid) for pid in workers)


def test_when_the_engines_process_dies_no_worker_stays(serving, toy_bundle):
    served = serving(toy_bundle, "--http-workers", "2")
    workers = served.workers()
    assert ask(served, "/v1/classify").status_code == 200
    served.process.kill()
    served.process.wait(30)
    assert all(has_ended(pid, within_s=30) for pid in workers)


def test_a_taken_port_is_refused_although_workers_share_theirs(front, processes, toy_bundle):
    port = str(httpx.URL(front.url).port)
    second = processes(toy_bundle, "--port", port, "--http-workers", "2")
    said, _ = second.communicate(timeout=60)
    assert second.returncode != 0
    assert "in use" in said


def has_ended(pid, within_s=0.0):
    """Whether a process, which need not be a child of this one, ends within this time."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], within_s)[0])
    finally:
        os.close(process)
