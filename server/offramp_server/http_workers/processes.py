"""Starts the workers, starts those that crash again, within bounds, and stops them."""

import asyncio
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from offramp_server.http_workers.messages import Stop, Welcome
from offramp_server.http_workers.port import Port

logger = logging.getLogger("offramp.server")

START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 10.0
"""Above the time that a worker gives slow readers and half-sent bodies."""
MAX_CRASHES: Final = 10
CRASH_WINDOW_S: Final = 60.0
"""More than `MAX_CRASHES` within this time: something is wrong that starting again does not mend."""
RESTART_DELAY_S: Final = 0.2
POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Plan:
    """How workers are started.

    Attributes:
        welcome: What each is told first.
        memory_bytes: Size of each one's arena.
        open_port: Makes the engine's side of a channel over an arena.
        join: Tells a welcomed worker about the models.
        leave: Forgets one that has gone.
        on_count: Told how many serve.
        on_crash: Told that one has crashed.
    """

    welcome: Welcome
    memory_bytes: int
    open_port: Callable[[mmap.mmap], Port]
    join: Callable[[Port], None]
    leave: Callable[[Port], None]
    on_count: Callable[[int], None]
    on_crash: Callable[[], None]


class Processes:
    """One process for each listening socket, as long as they are wanted.

    Args:
        plan: How they are started.
        listeners: One each. They stay open here, so that connections wait in them while a worker starts again.

    Attributes:
        has_failed: Set when they crash too often.
    """

    def __init__(self, plan: Plan, listeners: list[socket.socket]) -> None:
        self._plan = plan
        self._listeners = listeners
        self._running: dict[Port, subprocess.Popen[bytes]] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._crashes: deque[float] = deque(maxlen=MAX_CRASHES + 1)
        self._num_serving = 0
        self._is_stopping = False
        self._are_up = asyncio.Event()
        self.has_failed = asyncio.Event()

    async def start(self) -> None:
        """Start all; returns when they serve or have failed."""
        self._keepers = [asyncio.create_task(self._keep(listener)) for listener in self._listeners]
        await first_of(self._are_up, self.has_failed)

    async def stop(self) -> None:
        """Let them finish what is under way, and end them."""
        self._is_stopping = True
        for port in self._running:
            port.send(Stop())
        _, late = await asyncio.wait(self._keepers, timeout=STOP_TIMEOUT_S) if self._keepers else (set(), set())
        if late:
            logger.warning("%d HTTP workers did not stop within %g s and are killed", len(late), STOP_TIMEOUT_S)
        self.kill()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    def kill(self) -> None:
        """End all at once."""
        self._is_stopping = True
        for process in self._running.values():
            process.kill()

    async def _keep(self, listener: socket.socket) -> None:
        """Run one worker, again and again."""
        while not self._is_stopping and not self.has_failed.is_set():
            status = await self._run(listener)
            if self._is_stopping:
                return
            logger.error(
                "an HTTP worker ended with status %d; its requests are cancelled and it is started again", status
            )
            self._plan.on_crash()
            self._crashes.append(time.monotonic())
            if len(self._crashes) > MAX_CRASHES and self._crashes[-1] - self._crashes[0] < CRASH_WINDOW_S:
                logger.critical("HTTP workers have crashed %d times within %g s", MAX_CRASHES + 1, CRASH_WINDOW_S)
                self.has_failed.set()
                return
            await asyncio.sleep(RESTART_DELAY_S)

    async def _run(self, listener: socket.socket) -> int:
        """Run a worker to its end; gives its exit status."""
        ours, theirs = socket.socketpair()
        memory_fd = os.memfd_create("offramp-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory_fd, self._plan.memory_bytes)
            port = self._plan.open_port(mmap.mmap(memory_fd, self._plan.memory_bytes))
            process = _start(theirs.fileno(), listener.fileno(), memory_fd)
        finally:
            theirs.close()
            os.close(memory_fd)
        self._running[port] = process
        serving = asyncio.create_task(self._welcome(port, ours, process))
        try:
            return await _ended(process)
        finally:
            serving.cancel()
            with suppress(asyncio.CancelledError):
                await serving
            port.channel.abort()
            del self._running[port]
            self._plan.leave(port)

    async def _welcome(self, port: Port, ours: socket.socket, process: subprocess.Popen[bytes]) -> None:
        """Speak with a worker until its channel is lost; one that does not come up in time is killed."""
        ours.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: port.channel, sock=ours)
        port.send(self._plan.welcome)
        self._plan.join(port)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await port.ready.wait()
        except TimeoutError:
            logger.error("an HTTP worker did not start within %g s and is killed", START_TIMEOUT_S)
            process.kill()
            return
        self._count(1)
        try:
            await port.lost.wait()
            if not self._is_stopping:
                process.kill()  # without its channel it is of no use
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self._num_serving += change
        self._plan.on_count(self._num_serving)
        if self._num_serving == len(self._listeners):
            self._are_up.set()


async def first_of(*events: asyncio.Event) -> None:
    """Wait for the first of some events."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


def _start(channel_fd: int, listener_fd: int, memory_fd: int) -> subprocess.Popen[bytes]:
    # Settings, the API key among them, come over the channel: the worker reads no environment of its own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OFFRAMP_")}
    descriptors = (channel_fd, listener_fd, memory_fd)
    return subprocess.Popen(
        [sys.executable, "-m", "offramp_server.http_workers", *map(str, descriptors)],
        stdin=subprocess.DEVNULL,
        pass_fds=descriptors,
        env=environment,
    )


async def _ended(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process to end; if nobody waits any more, end it."""
    try:
        while (status := process.poll()) is None:
            await asyncio.sleep(POLL_S)
        return status
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
