"""A real HTTP server whose answers the test scripts."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest
from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

TURNS_TO_ACCEPT = 8
"""Turns of the loop, and a few more, in which a connection that the kernel has made becomes one of the server's. One
that the server's end comes between is nobody's, and so never closed."""


@contextmanager
def _listening(handler: Handler, *, has_metrics: bool = False) -> Iterator[str]:
    async def route(request: web.Request) -> web.StreamResponse:
        if request.path.endswith("/metrics") and not has_metrics:
            return web.Response(status=404)
        return await handler(request)

    loop = asyncio.new_event_loop()
    started: asyncio.Future[int] = loop.create_future()
    stopping = asyncio.Event()

    async def serve() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", route)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        started.set_result(runner.addresses[0][1])
        ready.set()
        await stopping.wait()
        for _ in range(TURNS_TO_ACCEPT):
            await asyncio.sleep(0)
        await runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    ready = threading.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(10)
        yield f"http://127.0.0.1:{started.result()}"
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join(10)
        loop.close()


@pytest.fixture
def scripted_server():
    """Serve with a handler; gives the URL."""
    return _listening
