"""The engine: admits requests, owns the device's thread, drains, and knows whether it is healthy.

Two invariants: every admitted request gets exactly one answer, and readiness is the engine's word. A thread that dies
answers everyone it owed and makes the engine not ready.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from offramp_contract.errors import InvalidValue, NotReady, OfframpError, UnknownModel
from offramp_runtime import Bundle, Device, open_bundle, open_device

from offramp_server.admission import Admission
from offramp_server.engine_settings import EngineSettings
from offramp_server.fields import NoLimits, read_routing
from offramp_server.inputs import conform
from offramp_server.loop import DeviceLoop
from offramp_server.messages import NoObserver, Observer, RequestOptions, Result
from offramp_server.scheduler import Scheduler
from offramp_server.served import Clock, ServedModel
from offramp_server.shield import ShieldedObserver
from offramp_server.submission import Listener, Sample, Submission, Waiter

logger = logging.getLogger(__name__)

ROUNDS_PER_CHORE = 8
"""While there is work, profiling a new model gets one run in so many rounds."""
CLOSE_TIMEOUT_S = 60.0


@dataclass(slots=True)
class _Chore:
    """Work for the device that nobody waits for with a deadline, in small steps.

    Attributes:
        steps: Gives, before each step, the seconds that step is expected to take.
        next_s: Those of the next step.
        done: Resolved when no step is left.
    """

    steps: Iterator[float]
    next_s: float = 0.0
    done: Future[None] = field(default_factory=Future)


class Engine:
    """Serves models on one device, in process; HTTP is a layer on top.

    Args:
        device: Where the stages run.
        settings: The operator's knobs.
        observer: Is told what happens.
        clock: Gives seconds; deadlines are reckoned on it.
    """

    def __init__(
        self,
        device: Device | None = None,
        settings: EngineSettings | None = None,
        observer: Observer | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.device = device or open_device("auto")
        self.settings = settings or EngineSettings()
        self._observer = ShieldedObserver(observer or NoObserver())
        self._clock = clock
        self._admission = Admission(self.settings)
        self._cancel_signal = threading.Event()
        margin_s = self.settings.margin_ms / 1e3
        scheduler: Scheduler[Sample] = Scheduler(self.settings.max_batch, margin_s, self.settings.fair_share_ms / 1e3)
        self._loop = DeviceLoop(
            scheduler,
            observer=self._observer,
            clock=clock,
            margin_s=margin_s,
            on_settled=self._on_settled,
            cancel_signal=self._cancel_signal,
        )
        self._wakeup = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._chores: deque[_Chore] = deque()
        self._models: tuple[ServedModel, ...] = ()
        self._is_draining = False
        self._is_stopping = False
        self._cause_of_death: str | None = None
        self._thread = threading.Thread(target=self._serve, name="offramp-engine", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, bundle: Path | str, device: str = "auto", settings: EngineSettings | None = None) -> Self:
        """Load one bundle into a new engine: for notebooks, tests and benchmarks. Close it, or use `with`."""
        engine = cls(open_device(device), settings)
        try:
            engine.add_model(open_bundle(Path(bundle)))
        except BaseException:
            engine.close()
            raise
        return engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """The loaded, warmed-up models."""
        return self._models

    @property
    def why_not_ready(self) -> str | None:
        """The reason why no request is admitted, or None."""
        if self._cause_of_death is not None:
            return f"the engine has died: {self._cause_of_death}"
        if self._is_stopping or not self._thread.is_alive():
            return "the engine is closed"
        return "the engine is draining" if self._is_draining else None

    @property
    def is_ready(self) -> bool:
        """Whether requests are admitted."""
        return self.why_not_ready is None

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs; false means that only a restart helps."""
        return self._cause_of_death is None and self._thread.is_alive()

    @property
    def num_inflight(self) -> int:
        """Admitted, unanswered rows."""
        return self._admission.num_inflight()

    def add_model(self, bundle: Bundle, name: str | None = None) -> ServedModel:
        """Load a bundle, warm it up and profile it while the others go on serving; blocks until it is ready.

        Raises:
            ManifestError: If a graph cannot be loaded or does not fit the manifest.
            NotReady: If the engine is closed or dies meanwhile.
        """
        served = ServedModel(name or bundle.manifest.name, bundle, self.device, self.settings.max_batch)
        chore = _Chore(served.warm_up(self._clock, self.settings.warm_up_s))
        self._command(lambda: self._chores.append(chore))
        chore.done.result()
        self._observer.model_added(served.loaded)
        self._command(lambda: self._loop.add_model(served))
        with self._wakeup:
            self._models = (*self._models, served)
        self._observer.inflight_changed(served.name, served.version, 0)
        return served

    def remove_model(self, served: ServedModel, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Stop admitting requests for a model, let those in flight finish, and unload it."""
        with self._wakeup:  # a request is admitted under this lock: none slips in behind the wait below
            self._models = tuple(model for model in self._models if model is not served)
        self._admission.wait_until_empty(served, timeout_s)
        error = NotReady(f"model {served.name!r} was unloaded")
        self._command(lambda: self._unload(served, error))

    def submit(
        self,
        served: ServedModel,
        inputs: dict[str, np.ndarray],
        options: RequestOptions,
        listener: Listener,
        arrival_s: float | None = None,
    ) -> Submission:
        """Admit a request.

        Args:
            served: One of `models`.
            inputs: One array per model input, checked against the manifest, all with the same number of rows >= 1.
            options: How its rows are routed.
            listener: Gets its events, the last of which is its one `Result`.
            arrival_s: When it arrived, on the engine's clock; now if not given.

        Raises:
            NotReady: If the engine is draining, closed or dead, or the model is not loaded (any more).
            TooLarge, Overloaded, DeadlineExceeded: See `Admission.admit`.
        """
        now = self._clock()
        arrived = now if arrival_s is None else arrival_s
        budget_ms = self.settings.default_latency_ms if options.latency_ms is None else options.latency_ms
        submission = Submission(
            served,
            inputs,
            options,
            listener=listener,
            arrival_s=arrived,
            budget_ms=budget_ms,
            cancel_signal=self._cancel_signal,
        )
        try:
            with self._wakeup:
                self._refuse_unless_ready(served)
                num_inflight = self._admission.admit(served, submission.num_rows, options, submission.deadline_s - now)
                # Told before the engine can answer, so that the last number told is that of the last answer.
                self._observer.inflight_changed(served.name, served.version, num_inflight)
                self._commands.append(lambda: self._loop.enqueue(submission, now))
                self._wakeup.notify()
        except OfframpError as error:
            self._observer.rejected(served.name, served.version, error.code)
            raise
        return submission

    def classify(
        self, inputs: np.ndarray | dict[str, np.ndarray], *, model: str | None = None, **fields: Any
    ) -> Result:
        """Answer a request in process; blocks until the answer is there.

        Args:
            inputs: The model's input with or without the batch axis, or a dict with one array per input.
            model: Which model; needed only if several are loaded.
            **fields: The request fields of the REST API: `policy`, `threshold`, `patience`, `latency_ms`, `compute`,
                `accuracy`, `risk`, `min_exit`, `max_exit`, `gate_threshold`, `gates`, `combine`, `on_miss`, `explain`.

        Raises:
            RequestError: If an input or a field is not one the model can honour.
            NotReady, Overloaded, DeadlineExceeded: If the request is not admitted.
        """
        served = self.model(model)
        routing = read_routing(fields, served.manifest, served.calibration, NoLimits(), wants_logits=True)
        arrays = inputs if isinstance(inputs, dict) else {served.manifest.inputs[0].name: inputs}
        checked = conform(arrays, served.manifest, self.settings.max_inflight_samples, allow_single=True)
        waiter = Waiter()
        self.submit(served, checked, routing.options, waiter)
        return waiter.result.result()

    def model(self, name: str | None = None) -> ServedModel:
        """Give the model of that name, the newest of its versions, or the only one.

        Raises:
            UnknownModel: If there is none.
            InvalidValue: If there are several and no name.
        """
        if name is None and len({served.name for served in self._models}) > 1:
            raise InvalidValue("model: several are loaded, name one", field="model")
        for served in reversed(self._models):
            if name in (None, served.name):
                return served
        raise UnknownModel(f"model: no model {name!r} is loaded", field="model")

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and let those in flight finish; false if that takes longer than the timeout."""
        with self._wakeup:  # as in `remove_model`
            self._is_draining = True
        return self._admission.wait_until_empty(None, timeout_s)

    def close(self) -> None:
        """Stop the thread; requests still in flight are answered with `NotReady`."""
        with self._wakeup:
            self._is_stopping = True
            self._wakeup.notify()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _refuse_unless_ready(self, served: ServedModel) -> None:
        reason = self.why_not_ready
        if reason is not None:
            raise NotReady(reason)
        if served not in self._models:
            raise NotReady(f"model {served.name!r} is not loaded")

    def _unload(self, served: ServedModel, error: OfframpError) -> None:
        self._loop.remove_model(served, error)
        self._observer.model_removed(served.name, served.version)

    def _command(self, command: Callable[[], None]) -> None:
        with self._wakeup:
            if self._cause_of_death is not None or self._is_stopping:
                raise NotReady(self.why_not_ready or "the engine is closed")
            self._commands.append(command)
            self._wakeup.notify()

    def _on_settled(self, served: ServedModel, num_rows: int) -> None:
        left = self._admission.release(served, num_rows)
        self._observer.inflight_changed(served.name, served.version, left)

    def _serve(self) -> None:
        """Be the device's thread."""
        try:
            rounds = 0
            while self._wait_for_work():
                self._obey()
                ran = self._loop.step()
                rounds += 1
                if self._chores and (not ran or rounds % ROUNDS_PER_CHORE == 0):
                    self._advance(self._chores[0])
        except BaseException as error:
            logger.critical("the engine's thread has died", exc_info=True)
            self._cause_of_death = type(error).__name__
        finally:
            self._answer_everyone()

    def _wait_for_work(self) -> bool:
        with self._wakeup:
            self._wakeup.wait_for(
                lambda: bool(self._commands or self._chores or self._loop.has_work or self._is_stopping)
            )
            return not self._is_stopping

    def _obey(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _advance(self, chore: _Chore) -> None:
        """Do one step of a chore, unless that would break the promise of a row that waits."""
        if chore.next_s > self._loop.slack_s:
            return
        try:
            chore.next_s = next(chore.steps)
        except StopIteration:
            self._chores.popleft()
            chore.done.set_result(None)
        except Exception as error:
            # A model that cannot even be warmed up is its loader's problem; the others go on.
            self._chores.popleft()
            chore.done.set_exception(error)

    def _answer_everyone(self) -> None:
        with self._wakeup:
            self._is_stopping = True
        error = NotReady(self.why_not_ready or "the engine is closed")
        while self._commands:
            with suppress(Exception):  # what killed the thread may have left anything behind it in any state
                self._commands.popleft()()
        for chore in self._chores:
            chore.done.set_exception(error)
        self._loop.abandon(error)
