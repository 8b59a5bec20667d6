"""`offramp serve` as processes of their own, as an operator runs it."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

SERVES = re.compile(r"Offramp serves .* at (http://\S+) ")


@dataclass
class Served:
    """A server that runs.

    Attributes:
        log: What it has said up to the moment at which it served, and on demand more.
    """

    process: subprocess.Popen
    url: str
    log: list[str] = field(default_factory=list)

    def client(self, **given):
        """Give a client that opens a new connection for each request, so that any worker may answer."""
        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, limits=limits, **given)

    def scrape(self):
        """Give the values of all series, by name and labels."""
        with self.client() as client:
            text = client.get("/metrics").text
        return {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def workers(self):
        """Give the process ids of its workers."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return sorted(int(pid) for pid in listed.split())

    def read_log_until(self, words):
        """Read on until a line holds these words; gives it."""
        for line in self.process.stdout:
            self.log.append(line)
            if words in line:
                return line
        raise AssertionError(f"the log ends without {words!r}: {''.join(self.log)}")

    def stop(self):
        """Stop it as an operator would; gives its exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(30)
        self.log += self.process.stdout.readlines()
        return status


def start(path, *flags):
    """Start a server and do not wait for it."""
    command = [sys.executable, "-m", "offramp_cli", "serve", str(path), "--port", "0", "--threads", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONHASHSEED": "0"}
    return subprocess.Popen(
        [*command, "--warm-up-s", "0.1", "--device", "cpu", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def wait_for(process):
    """Wait until a server serves."""
    log = []
    for line in process.stdout:
        log.append(line)
        if found := SERVES.search(line):
            return Served(process, found[1], log)
    raise AssertionError(f"the server has not started: {''.join(log)}")


@pytest.fixture(scope="session")
def processes():
    """Start servers, and end at the end what has not been stopped."""
    started = []

    def started_with(path, *flags):
        started.append(start(path, *flags))
        return started[-1]

    yield started_with
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="session")
def serving(processes):
    """Serve a bundle, or a repository, under flags."""
    return lambda path, *flags: wait_for(processes(path, *flags))


@pytest.fixture(scope="session")
def both(processes, toy_bundle):
    """The same bundle behind one process and behind two workers."""
    flags = ("--max-body-bytes", "200000", "--max-rows", "16")
    started = [processes(toy_bundle, *flags), processes(toy_bundle, *flags, "--http-workers", "2")]
    return [wait_for(process) for process in started]


@pytest.fixture(scope="session")
def front(both):
    """The toy bundle behind two workers."""
    return both[1]
