"""Runs `offramp serve` as a process of its own, as a person would, and stops it the way an operator would."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from offramp_cli.errors import CommandError

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 40.0
POLL_S = 0.1


@contextmanager
def server_process(bundle: Path, log: Path, flags: Sequence[str] = ()) -> Iterator[str]:
    """Serve a bundle on a free port of this machine while the block runs; gives the server's URL once it is ready.

    Args:
        bundle: What to serve.
        log: Where the server's output goes.
        flags: Further flags of `offramp serve`.

    Raises:
        CommandError: If the server does not become ready, or does not stop cleanly on SIGTERM.
    """
    port = _free_port()
    command = [sys.executable, "-m", "offramp_cli", "serve", str(bundle), "--port", str(port), *flags]
    with log.open("wb") as output:
        # A session of its own: Ctrl-C is for us, and we stop the server with SIGTERM.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_until_ready(url, process, log)
            yield url
        finally:
            status = _stop(process)
    if status != 0:
        raise CommandError(f"the server ended with status {status}; its output is in {log}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up = time.monotonic() + START_TIMEOUT_S
    with httpx.Client(base_url=url, trust_env=False, timeout=5) as client:
        while process.poll() is None and time.monotonic() < give_up:
            try:
                if client.get("/v2/health/ready").status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass  # nothing listens yet
            time.sleep(POLL_S)
    lines = log.read_text(errors="replace").strip().splitlines()
    why = f": {lines[-1]}" if lines else ""
    raise CommandError(f"the server did not become ready{why} (its output is in {log})")


def _stop(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    try:
        return process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
