import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from offramp_server.engine import Engine
from offramp_server.messages import NoObserver, StageRun

SERVER = """
import logging, sys
from pathlib import Path
from offramp_runtime import open_bundle, open_device
from offramp_server.app import create_app
from offramp_server.engine import Engine
from offramp_server.metrics import Metrics
from offramp_server.repository import Repository
from offramp_server.serve import run_server
from offramp_server.settings import ServerSettings

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
settings = ServerSettings.load(port=0, threads=1, warm_up_s=0.1)
metrics = Metrics()
engine = Engine(open_device("cpu", 1), settings.engine_settings(), metrics)
engine.add_model(open_bundle(Path(sys.argv[1])))
run_server(create_app(settings, Repository(engine), engine, metrics), settings, engine)
engine.close()
"""


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_with_status_0(toy_bundle: Path, sig: signal.Signals) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", SERVER, str(toy_bundle)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("Offramp serves "))
        url = line.split(" at ")[1].split(" ")[0]
        assert line == f"Offramp serves toy at {url} (docs: {url}/docs, metrics: {url}/metrics)\n"
        with httpx.Client(base_url=url, trust_env=False) as client:  # an idle connection does not hold it up
            assert client.post("/v1/classify", json={"inputs": [0, 9, 0, 0]}).status_code == 200
            process.send_signal(sig)
            assert process.wait(30) == 0


def test_a_process_that_serves_does_not_search_its_start_up_for_garbage(toy_bundle: Path) -> None:
    told = "import gc, uvicorn\nuvicorn.Server.run = lambda self, sockets: print('exempt:', gc.get_freeze_count())\n"
    command = [sys.executable, "-c", told + SERVER, str(toy_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("exempt: "))
    assert int(line.removeprefix("exempt: ")) > 10_000


class Hold(NoObserver):
    """Holds the engine's thread after the first stage until the test lets it go on."""

    __slots__ = ("go_on", "is_held")

    def __init__(self) -> None:
        object.__setattr__(self, "is_held", threading.Event())
        object.__setattr__(self, "go_on", threading.Event())

    def stage_ran(self, run: StageRun) -> None:
        self.is_held.set()
        self.go_on.wait(30)


def test_what_the_drain_leaves_is_answered_with_503(
    serve: Callable[..., Any], make_bundle: Callable[..., Path]
) -> None:
    hold = Hold()

    class Closing(Engine):
        """Lets its held thread go on once it is being closed."""

        def close(self) -> None:
            hold.go_on.set()
            super().close()

    slow = make_bundle(work=5000)  # a stage takes many times as long as telling the thread to stop
    running = serve(slow, observer=hold, engine_type=Closing, drain_timeout_s=0)
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(ask(running.url)))
    asking.start()
    assert hold.is_held.wait(30)
    running.server.stop("test")
    asking.join(30)
    assert [(answer.status_code, answer.json()["type"]) for answer in answers] == [(503, "/problems/not-ready")]
    running.thread.join(30)
    assert not running.thread.is_alive()


def ask(url: str) -> httpx.Response:
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        return client.post("/v1/classify", json={"inputs": [0.01, 0, 0, 0], "latency_ms": 60_000})


def test_what_was_admitted_is_answered_and_what_comes_later_is_refused(
    serve: Callable[..., Any], toy_bundle: Path
) -> None:
    hold = Hold()
    running = serve(toy_bundle, observer=hold)
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(ask(running.url)))
    asking.start()
    assert hold.is_held.wait(30)
    running.server.stop("test")
    running.run(asyncio.sleep(0))  # what was asked of the loop before has been done
    refused = ask(running.url)
    assert (refused.status_code, refused.json()["type"]) == (503, "/problems/not-ready")
    assert refused.headers["retry-after"] == "1"
    hold.go_on.set()
    asking.join(30)
    running.thread.join(30)
    assert not running.thread.is_alive()
    assert [answer.status_code for answer in answers] == [200]
