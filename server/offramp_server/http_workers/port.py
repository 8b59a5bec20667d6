"""One worker as the engine's process sees it: its requests go in, and what the engine tells of them comes out."""

import asyncio
import logging
import mmap
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Final

from offramp_contract.errors import OfframpError

from offramp_server.api.problems import internal_problem
from offramp_server.engine import Engine
from offramp_server.http_workers.channel import Channel, FrameTooLarge
from offramp_server.http_workers.messages import (
    Cancel,
    Ready,
    Refused,
    Rejected,
    RelayAnswer,
    Relayed,
    Submit,
    Synced,
    ToWorker,
    WrittenError,
    decode_for_engine,
    encode,
)
from offramp_server.http_workers.tensors import InputLayout
from offramp_server.http_workers.writing import options_of, written_error, written_event
from offramp_server.messages import Observer, Progress, Result
from offramp_server.served import ServedModel
from offramp_server.submission import Submission

logger = logging.getLogger("offramp.server")

UNLOADED: Final = WrittenError("not_ready", "the model was unloaded")
TOO_LARGE: Final = WrittenError(OfframpError.code, "the answer is too large to be passed on")


class Port:
    """Speaks with one worker, on the event loop of the engine's process.

    Args:
        engine: Answers.
        models: Those that requests may name, by number; the hub keeps them.
        observer: Counts what workers refuse.
        memory: The worker's arena. It is unmapped when the last request that lies in it is forgotten.
        relay: Answers an HTTP request.
        on_synced: Called when the worker goes by another catalogue.

    Attributes:
        channel: To the worker.
        ready: Done when the worker serves.
        lost: Set when it has gone.
        synced: Number of the catalogue it goes by.
    """

    def __init__(
        self,
        engine: Engine,
        models: Mapping[int, ServedModel],
        observer: Observer,
        memory: mmap.mmap,
        *,
        relay: Callable[[Relayed], Awaitable[RelayAnswer]],
        on_synced: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._models = models
        self._observer = observer
        self._memory = memory
        self._relay = relay
        self._on_synced = on_synced
        self._loop = asyncio.get_running_loop()
        self._submissions: dict[int, Submission] = {}
        self._numbers: dict[Submission, int] = {}
        self._layouts: dict[int, InputLayout] = {}
        self._relaying: set[asyncio.Task[None]] = set()
        self.channel = Channel(self._receive, self._end)
        self.ready = asyncio.Event()
        self.lost = asyncio.Event()
        self.synced = -1

    def send(self, message: ToWorker) -> None:
        """Tell the worker something."""
        self.channel.send(encode(message))

    def deliver(self, events: list[tuple[Submission, Progress | Result]]) -> None:
        """Take a dispatch's events; called on an engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody is left who waits
            self._loop.call_soon_threadsafe(self._pass_on, events)

    def _pass_on(self, events: list[tuple[Submission, Progress | Result]]) -> None:
        for submission, event in events:
            number = self._numbers[submission]
            if isinstance(event, Result):
                del self._numbers[submission], self._submissions[number]
            try:
                self.send(written_event(number, event))
            except FrameTooLarge:
                if isinstance(event, Result):
                    self.send(Refused(number, TOO_LARGE))

    def _receive(self, message: bytes) -> None:
        match decode_for_engine(message):
            case Submit() as asked:
                self._submit(asked)
            case Cancel(request):
                submission = self._submissions.get(request)
                if submission is not None:  # else its answer has crossed with this
                    submission.cancel()
            case Rejected(model, version, reason):
                self._observer.rejected(model, version, reason)
            case Relayed() as relayed:
                task = self._loop.create_task(self._answer(relayed))
                self._relaying.add(task)
                task.add_done_callback(self._relaying.discard)
            case Synced(number):
                self.synced = number
                self._on_synced()
            case Ready():
                self.ready.set()

    def _submit(self, asked: Submit) -> None:
        served = self._models.get(asked.model)
        if served is None:
            self.send(Refused(asked.request, UNLOADED))
            return
        layout = self._layouts.get(asked.model)
        if layout is None:
            layout = self._layouts[asked.model] = InputLayout(served.manifest.inputs)
        try:
            options = options_of(asked.options, served.manifest)
            inputs = layout.read(self._memory, asked.start, asked.num_rows)
            submission = self._engine.submit(served, inputs, options, self, asked.arrival_s)
        except OfframpError as error:
            self.send(Refused(asked.request, written_error(error)))
            return
        except Exception:  # one request's bug must not end the worker, which has others
            logger.exception("a request to model %s failed", served.name)
            self.send(Refused(asked.request, WrittenError(OfframpError.code, internal_problem()["detail"])))
            return
        self._submissions[asked.request] = submission
        self._numbers[submission] = asked.request

    async def _answer(self, relayed: Relayed) -> None:
        answer = await self._relay(relayed)
        try:
            self.send(answer)
        except FrameTooLarge:
            self.send(RelayAnswer(relayed.request, 500, (), b""))

    def _end(self) -> None:
        """The worker has gone: nobody waits for its requests any more."""
        self.lost.set()
        self._on_synced()
        for submission in self._submissions.values():
            submission.cancel()
        for task in self._relaying:
            task.cancel()
