"""The engine as a worker sees it: asked over the channel, and answering over it."""

import asyncio
import itertools
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from offramp_contract.errors import NotReady, Overloaded

from offramp_server.asking import Asking, Event
from offramp_server.catalogue import Catalogue, Entry
from offramp_server.http_workers.arena import Arena, Borrower, Span
from offramp_server.http_workers.channel import Channel
from offramp_server.http_workers.messages import (
    Cancel,
    CatalogueChanged,
    ModelAdded,
    ModelGone,
    Refused,
    Rejected,
    RelayAnswer,
    Relayed,
    Submit,
    Synced,
    ToEngine,
    ToWorker,
    WrittenProgress,
    WrittenResult,
    encode,
)
from offramp_server.http_workers.models import RemoteModel, remote_model
from offramp_server.http_workers.writing import error_of, event_of, written_options
from offramp_server.messages import Inputs, RequestOptions
from offramp_server.settings import ServerSettings

GONE: Final = "the engine's process has ended"
RETRY_AFTER_S: Final = 1.0


def _ignore(event: Event) -> None:
    """Nobody waits any more."""


@dataclass(slots=True, eq=False)
class RemoteSubmission:
    """A request that the engine has, or will have once there is memory for its inputs.

    Attributes:
        number: What both sides call it.
        take: Gets its events.
        borrower: Its place among those who wait for memory.
        give_up: Ends that wait.
        span: The memory of its inputs, lent until its last event.
    """

    number: int
    take: Callable[[Event], None]
    borrower: Borrower | None = None
    give_up: asyncio.TimerHandle | None = None
    span: Span | None = None


class RemoteEngine(Asking["RemoteEngine", RemoteModel, RemoteSubmission]):
    """Asks the engine in the other process, and waits for it. Used on the worker's event loop only.

    Args:
        channel: To the engine's process.
        settings: The operator's.
        memory: What inputs are written to, shared with the engine.

    Attributes:
        settings: The operator's.
        arena: Lends the memory.
        catalogue: Which models answer to which names.
    """

    def __init__(self, channel: Channel, settings: ServerSettings, memory: mmap.mmap) -> None:
        self.settings = settings
        self.arena = Arena(len(memory))
        self.catalogue: Catalogue[RemoteModel] = Catalogue(settings.default_model)
        self._channel = channel
        self._memory = memory
        self._loop = asyncio.get_running_loop()
        self._models: dict[int, RemoteModel] = {}
        self._pending: dict[int, RemoteSubmission] = {}
        self._relayed: dict[int, asyncio.Future[RelayAnswer]] = {}
        self._numbers = itertools.count()
        self._is_gone = False

    def ask(
        self,
        engine: "RemoteEngine",
        served: RemoteModel,
        inputs: Inputs,
        options: RequestOptions,
        arrival_s: float | None = None,
        *,
        take: Callable[[Event], None],
    ) -> RemoteSubmission:
        """Submit a request whose events are taken by a function, later; see `Asking.ask`.

        The engine's refusals are events here, since they come over the channel.

        Raises:
            NotReady: If the engine's process has ended.
            TooLarge: If the inputs are larger than the memory.
        """
        self._refuse_if_gone()
        submission = RemoteSubmission(next(self._numbers), take)
        num_rows = len(next(iter(inputs.values())))

        def send(span: Span) -> None:
            if submission.give_up is not None:
                submission.give_up.cancel()
            submission.borrower, submission.give_up, submission.span = None, None, span
            served.layout.write(inputs, self._memory, span.start)
            written = written_options(options)
            self._send(Submit(submission.number, served.number, span.start, num_rows, arrival_s, written))

        submission.borrower = self.arena.lend(served.layout.num_bytes(num_rows), send)
        if submission.borrower is not None:
            submission.give_up = self._loop.call_later(self.settings.max_wait_ms / 1e3, self._end_wait, submission)
        self._pending[submission.number] = submission
        return submission

    def forget(self, submission: RemoteSubmission) -> None:
        """Take no more events of a submission; see `Asking.forget`."""
        if submission.number not in self._pending:
            return
        submission.take = _ignore
        if submission.borrower is not None:
            self._settle(submission.number, NotReady(GONE))
        else:
            self._send(Cancel(submission.number))

    async def relay(self, ask: Callable[[int], Relayed]) -> RelayAnswer:
        """Let the engine's process answer an HTTP request, which is given the number that both sides call it.

        Raises:
            NotReady: If it has ended.
        """
        self._refuse_if_gone()
        number = next(self._numbers)
        answered: asyncio.Future[RelayAnswer] = self._loop.create_future()
        self._relayed[number] = answered
        self._send(ask(number))
        try:
            return await answered
        finally:
            del self._relayed[number]

    def rejected(self, model: str, version: str, reason: str) -> None:
        """Have a request counted that was refused before it was submitted."""
        self._send(Rejected(model, version, reason))

    def take(self, message: ToWorker) -> None:
        """Take what the engine says."""
        match message:
            case WrittenProgress():
                self._pending[message.request].take(event_of(message))
            case WrittenResult():
                self._settle(message.request, event_of(message))
            case Refused():
                self._settle(message.request, error_of(message.error))
            case RelayAnswer():
                answered = self._relayed.get(message.request)
                if answered is not None and not answered.done():
                    answered.set_result(message)
            case ModelAdded():
                self._models[message.model] = remote_model(message, self.settings)
            case ModelGone():
                del self._models[message.model]
            case CatalogueChanged():
                self._go_by(message)

    def end(self) -> None:
        """Answer everyone who waits: the engine's process has gone."""
        self._is_gone = True
        for number in list(self._pending):
            self._settle(number, NotReady(GONE))
        for answered in self._relayed.values():
            if not answered.done():
                answered.set_exception(NotReady(GONE))

    def _end_wait(self, submission: RemoteSubmission) -> None:
        self._settle(
            submission.number, Overloaded("the memory for inputs is taken by requests in flight", RETRY_AFTER_S)
        )

    def _settle(self, number: int, event: Event) -> None:
        """Give a request its last event, and its memory back."""
        submission = self._pending.pop(number)
        if submission.give_up is not None:
            submission.give_up.cancel()
        if submission.borrower is not None:
            self.arena.withdraw(submission.borrower)
        if submission.span is not None:
            self.arena.give_back(submission.span)
        submission.take(event)

    def _go_by(self, changed: CatalogueChanged) -> None:
        self.catalogue.entries = {
            listed.name: Entry(
                None if listed.model is None else self._models[listed.model],
                listed.reason,
                listed.is_loading,
                listed.is_held_back,
            )
            for listed in changed.entries
        }
        self._send(Synced(changed.number))

    def _refuse_if_gone(self) -> None:
        if self._is_gone:
            raise NotReady(GONE)

    def _send(self, message: ToEngine) -> None:
        self._channel.send(encode(message))
