"""Waits until a request is due, finer than an event loop's timers.

Event loops count in milliseconds, which is longer than a small model runs; the kernel's timers do not.
"""

import asyncio
import ctypes
import os
import sys
import time
from typing import Any, Final, Self

CLOCK_MONOTONIC: Final = 1
TFD_NONBLOCK: Final = os.O_NONBLOCK
SHORTEST_S: Final = 1e-6


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Pace:
    """A clock to wait by: Linux's timerfd, elsewhere the event loop's own timers.

    Args:
        started: The zero of its seconds, by `time.perf_counter`.
    """

    def __init__(self, started: float) -> None:
        self._started = started
        self._libc: Any = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        self._file = -1
        self._rang = asyncio.Event()

    def __enter__(self) -> Self:
        if self._libc is not None:
            self._file = self._libc.timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK)
        if self._file >= 0:
            asyncio.get_running_loop().add_reader(self._file, self._ring)
        return self

    def __exit__(self, *error: object) -> None:
        if self._file >= 0:
            asyncio.get_running_loop().remove_reader(self._file)
            os.close(self._file)

    async def until(self, due_s: float) -> None:
        """Wait until so many seconds after the start; if they have passed, only let answers be read."""
        delay_s = due_s - (time.perf_counter() - self._started)
        if delay_s <= 0:
            await asyncio.sleep(0)
            return
        if self._file < 0:
            await asyncio.sleep(delay_s)
            return
        seconds, rest_s = divmod(max(delay_s, SHORTEST_S), 1.0)
        once = _Itimerspec(value=_Timespec(int(seconds), int(rest_s * 1e9)))
        self._rang.clear()
        if self._libc.timerfd_settime(self._file, 0, ctypes.byref(once), None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")
        await self._rang.wait()

    def _ring(self) -> None:
        os.read(self._file, 8)
        self._rang.set()
