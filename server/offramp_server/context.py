"""What every handler may use, put together once when the server starts."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import Request

if TYPE_CHECKING:  # handlers need the context's shape, not its parts' modules
    from offramp_server.bridge import LoopBridge
    from offramp_server.engine import Engine
    from offramp_server.metrics import Metrics
    from offramp_server.repository import Repository
    from offramp_server.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class ServerContext:
    """The parts of a running server.

    Attributes:
        settings: The operator's settings.
        repository: Which models and versions are served.
        engine: Answers requests.
        bridge: Awaits the engine's answers on the server's event loop.
        metrics: Counts, and renders the exposition.
        workers: Threads for decoding; never for the event loop's own work.
    """

    settings: "ServerSettings"
    repository: "Repository"
    engine: "Engine"
    bridge: "LoopBridge"
    metrics: "Metrics"
    workers: ThreadPoolExecutor


def context_of(request: Request) -> ServerContext:
    """Give the context of the server that a request came to."""
    context: ServerContext = request.app.state.context
    return context
