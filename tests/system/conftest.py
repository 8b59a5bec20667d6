"""A real Prometheus that scrapes a real server while it answers a mixed load."""

import concurrent.futures
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from gated_bundles import TWO, gated_rows, write_gated
from offramp_cli.server_process import server_process
from offramp_contract.calibration import Certificate, OperatingPoint
from offramp_contract.policy_spec import ConfidenceSpec

ROOT = Path(__file__).parents[2]
DASHBOARDS = ROOT / "dashboards"
SCRAPE_INTERVAL = "200ms"
LIMIT_S = 60.0
POLL_S = 0.05
SERVE_FLAGS = ("--device", "cpu", "--threads", "1", "--warm-up-s", "0.3", "--max-inflight-samples", "32",
               "--gear-floor-accuracy", "0.5")  # fmt: skip
CERTIFIED = OperatingPoint(
    name="early", policy=ConfidenceSpec(threshold=0.5), compute=0.5, accuracy=0.9, exit_rates=(0.5, 0.5, 0.0),
    certificates=(
        Certificate(kind="accuracy", method="ltt", bound=0.8, delta=0.05, num_samples=400, data_digest="0" * 64),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus that runs."""

    client: httpx.Client

    def query(self, expr: str, time_s: float | None = None) -> list[dict[str, Any]]:
        """Evaluate now, or at a Unix time; gives Prometheus' own list of series, each with one value."""
        return self._result("query", query=expr, **({} if time_s is None else {"time": time_s}))

    def query_range(self, expr: str, start: float, end: float) -> list[dict[str, Any]]:
        """Evaluate once a second over a span of Unix time."""
        return self._result("query_range", query=expr, start=start, end=end, step=1)

    def rules(self) -> list[dict[str, Any]]:
        """Give every alert rule with its health."""
        groups = self.client.get("/api/v1/rules").raise_for_status().json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Ask again and again until a condition holds.

        Raises:
            TimeoutError: If it does not within a minute.
        """
        give_up = time.monotonic() + LIMIT_S
        while not condition():
            if time.monotonic() > give_up:
                raise TimeoutError(f"Prometheus does not show within {LIMIT_S:g} s that {what}")
            time.sleep(POLL_S)

    def _result(self, how: str, **params: Any) -> list[dict[str, Any]]:
        answer = self.client.get(f"/api/v1/{how}", params=params).json()
        assert answer["status"] == "success", f"{params['query']}: {answer.get('error')}"
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result


@dataclass(frozen=True)
class Observed:
    """What a scraped run left behind.

    Attributes:
        ended: Unix time after the last value had been scraped.
    """

    prometheus: Prometheus
    ended: float


@pytest.fixture(scope="session")
def observed(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """Serve, scrape, send the load, and wait until Prometheus knows all that the server counted."""
    folder = tmp_path_factory.mktemp("observed")
    models = folder / "models"
    shutil.copytree(
        make_bundle(name="digits", gains=(1.0, 10.0, 100.0), work=300, operating_points=(CERTIFIED,)), models / "digits"
    )
    write_gated(models / "gated", TWO, "gated")
    with server_process(models, folder / "server.log", SERVE_FLAGS) as url, scraping(url, folder) as prometheus:
        prometheus.until(lambda: bool(prometheus.query("offramp_inflight_samples == 0")), "the server is scraped")
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            send_mixed_load(client)
        counted = sum_of_requests(url)
        prometheus.until(
            lambda: (
                [series["value"][1] for series in prometheus.query("sum(offramp_requests_total)")] == [str(counted)]
            ),
            f"the server has seen {counted} requests",
        )
        prometheus.until(
            lambda: all(rule["health"] != "unknown" for rule in prometheus.rules()), "alerts are evaluated"
        )
        yield Observed(prometheus, time.time())


class scraping:
    """Run Prometheus on the committed configuration, but for where the server is and how often it is asked."""

    def __init__(self, url: str, folder: Path) -> None:
        config = yaml.safe_load((DASHBOARDS / "prometheus" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": SCRAPE_INTERVAL, "evaluation_interval": SCRAPE_INTERVAL}
        config["rule_files"] = [str(DASHBOARDS / "prometheus" / name) for name in config["rule_files"]]
        (job,) = config["scrape_configs"]
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [url.removeprefix("http://")]}]
        self._folder = folder
        self._config = folder / "prometheus.yml"
        self._config.write_text(yaml.safe_dump(config))

    def __enter__(self) -> Prometheus:
        address = f"127.0.0.1:{free_port()}"
        command = [
            "prometheus",
            f"--config.file={self._config}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address={address}",
        ]
        self._log = (self._folder / "prometheus.log").open("wb")
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT)
        self._client = httpx.Client(base_url=f"http://{address}", trust_env=False, timeout=30)
        prometheus = Prometheus(self._client)
        try:
            prometheus.until(self._is_ready, "it is ready")
        except BaseException:
            self.__exit__()
            raise
        return prometheus

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait(30)
        self._log.close()

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, (self._folder / "prometheus.log").read_text()
        try:
            return self._client.get("/-/ready").is_success
        except httpx.TransportError:
            return False


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def sum_of_requests(url: str) -> int:
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    return round(sum(float(line.split()[-1]) for line in lines if line.startswith("offramp_requests_total{")))


def send_mixed_load(client: httpx.Client) -> None:
    """Send what makes every kind of answer: each exit, each reason, deadlines met and missed, refusals, bad input."""

    def classify(rows: list[list[float]], **fields: Any) -> int:
        return client.post("/v1/models/digits/classify", json={"inputs": rows, **fields}).status_code

    clear, vague, hopeless = [9.0, 0, 0, 0], [0.5, 0, 0, 0], [0.001, 0, 0, 0]
    for _ in range(5):
        for policy in ("confidence", "margin"):
            assert classify([clear, vague, hopeless], policy=policy, threshold=0.9, latency_ms=60_000) == httpx.codes.OK
        assert classify([hopeless], policy="patience", patience=1) == httpx.codes.OK
        assert classify([hopeless], max_exit=1) == httpx.codes.OK
        assert classify([hopeless], policy={"kind": "fixed", "exit": 2}, latency_ms=0.01) == httpx.codes.OK  # forced
        assert classify([hopeless], latency_ms=0.01, on_miss="reject") == httpx.codes.GATEWAY_TIMEOUT
        assert classify([[1.0]]) == httpx.codes.UNPROCESSABLE_ENTITY
        assert classify([[3e38, -3e38, 0, 0]], policy={"kind": "fixed", "exit": 2}) == httpx.codes.UNPROCESSABLE_ENTITY
    rows = gated_rows((0.9, 0.1), (0.1, 0.9), (0.9, 0.9)).tolist()
    for budget_ms in (60_000, 0.01):  # gates open and shut, and forced
        answer = client.post("/v1/models/gated/classify", json={"inputs": rows, "latency_ms": budget_ms})
        assert answer.status_code == httpx.codes.OK
    with concurrent.futures.ThreadPoolExecutor(12) as clients:
        body = {"policy": json.loads('{"kind": "fixed", "exit": 2}')}
        statuses = list(clients.map(lambda _: classify([vague] * 32, **body), range(48)))
    assert set(statuses) == {httpx.codes.OK, httpx.codes.TOO_MANY_REQUESTS}
