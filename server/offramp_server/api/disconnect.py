"""Stops work whose client has gone."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

T = TypeVar("T")


async def unless_disconnected(request: Request, answer: Awaitable[T]) -> T:
    """Await an answer; if the client leaves first, cancel it.

    Call it once the body has been read: from then on the connection's next message can only be that it is lost.

    Raises:
        ClientDisconnect: If the client left.
    """
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("unless_disconnected runs inside a task")
    has_left = False

    async def watch() -> None:
        nonlocal has_left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_left = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await answer
    except asyncio.CancelledError:
        if has_left and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()
