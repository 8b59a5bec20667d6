"""What all workers share: the models that requests may name, and which names they answer to."""

import asyncio
import itertools
import logging
from contextlib import suppress
from typing import Final

from offramp_contract.errors import OfframpError
from starlette.types import ASGIApp

from offramp_server.engine import Engine
from offramp_server.http_workers.messages import (
    CatalogueChanged,
    Listed,
    ModelAdded,
    ModelGone,
    RelayAnswer,
    Relayed,
    ToWorker,
)
from offramp_server.http_workers.models import files_for_workers
from offramp_server.http_workers.port import Port
from offramp_server.http_workers.relay import answer_relayed
from offramp_server.repository import Repository
from offramp_server.served import ServedModel

logger = logging.getLogger("offramp.server")

SYNC_TIMEOUT_S: Final = 5.0
"""Longest that an answer to a request which has changed the catalogue waits for every worker to go by it."""


class Hub:
    """Tells the workers what the repository serves. Used on the event loop of the engine's process.

    Args:
        engine: Holds the models.
        repository: Says which names they answer to.
        app: Answers what workers pass on.

    Attributes:
        models: Those that requests may name, by number. A model that was replaced stays as long as the engine has it.
    """

    def __init__(self, engine: Engine, repository: Repository, app: ASGIApp) -> None:
        self.models: dict[int, ServedModel] = {}
        self._engine = engine
        self._repository = repository
        self._app = app
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._ports: dict[Port, None] = {}
        self._added: dict[int, ModelAdded] = {}
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._catalogue = CatalogueChanged(0, ())
        repository.on_change = self._tell_later
        self.tell()

    def join(self, port: Port) -> None:
        """Tell a new worker everything, and from now on every change."""
        for added in self._added.values():
            port.send(added)
        port.send(self._catalogue)
        self._ports[port] = None

    def leave(self, port: Port) -> None:
        """Forget a worker that has gone."""
        del self._ports[port]

    def notice(self) -> None:
        """Look again who waits: a worker goes by another catalogue, or has gone."""
        for number, synced in self._waiting:
            if not synced.done() and self._all_go_by(number):
                synced.set_result(None)

    async def answer(self, relayed: Relayed) -> RelayAnswer:
        """Answer a request that a worker has passed on; what it has changed, every worker knows by then."""
        answer = await answer_relayed(self._app, relayed)
        if not self._all_go_by(self._catalogue.number):
            await self._sync()
        return answer

    def tell(self) -> None:
        """Tell every worker what has changed."""
        held = self._engine.models
        for served in held:
            if served not in self.models.values():
                self._add(served)
        number_of = {served: number for number, served in self.models.items()}
        entries = tuple(
            Listed(
                name,
                None if entry.served is None else number_of.get(entry.served),
                entry.reason,
                entry.is_loading,
                entry.is_held_back,
            )
            for name, entry in sorted(self._repository.catalogue.entries.items())
        )
        if entries != self._catalogue.entries:
            self._catalogue = CatalogueChanged(self._catalogue.number + 1, entries)
            self._broadcast(self._catalogue)
        listed = {entry.model for entry in entries}
        for number in [n for n, served in self.models.items() if served not in held and n not in listed]:
            del self.models[number], self._added[number]
            self._broadcast(ModelGone(number))

    def _add(self, served: ServedModel) -> None:
        number = next(self._numbers)
        try:
            files = files_for_workers(served.bundle)
        except OfframpError as error:  # its files have gone since it was loaded; the repository will say so
            logger.warning("model %s is not passed on to the HTTP workers: %s", served.name, error.message)
            return
        self.models[number] = served
        self._added[number] = ModelAdded(number, served.name, served.version, files)
        self._broadcast(self._added[number])

    async def _sync(self) -> None:
        waiting = self._catalogue.number, self._loop.create_future()
        self._waiting.append(waiting)
        try:
            async with asyncio.timeout(SYNC_TIMEOUT_S):
                await waiting[1]
        except TimeoutError:
            logger.warning("an HTTP worker has not taken over a change of models within %g s", SYNC_TIMEOUT_S)
        finally:
            self._waiting.remove(waiting)

    def _tell_later(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: there are no workers any more
            self._loop.call_soon_threadsafe(self.tell)

    def _broadcast(self, message: ToWorker) -> None:
        for port in self._ports:
            port.send(message)

    def _all_go_by(self, number: int) -> bool:
        return all(port.synced >= number or port.lost.is_set() for port in self._ports)
