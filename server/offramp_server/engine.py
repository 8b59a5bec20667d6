"""The engine: admits requests, owns the device's threads, drains, and knows whether it is healthy.

Two invariants: every admitted request gets exactly one answer, and readiness is the engine's word. A thread that dies
makes the engine not ready, and everyone who is still owed an answer gets one.
"""

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from offramp_contract.errors import InvalidValue, NotReady, OfframpError, UnknownModel
from offramp_runtime import Bundle, Device, open_bundle, open_device

from offramp_server.admission import Admission, Lot
from offramp_server.choice import Choice
from offramp_server.engine_settings import EngineSettings
from offramp_server.fields import NoLimits, read_routing
from offramp_server.inputs import conform
from offramp_server.ladder import ladder_under
from offramp_server.loop import DeviceLoop
from offramp_server.messages import NoObserver, Observer, RequestOptions, Result
from offramp_server.rules import Rules
from offramp_server.runners import CLOSE_TIMEOUT_S, Runners
from offramp_server.scheduler import Scheduler
from offramp_server.served import Clock, ServedModel
from offramp_server.shield import ShieldedObserver
from offramp_server.submission import Listener, Sample, Submission, Waiter
from offramp_server.widths import MOST_ABREAST

logger = logging.getLogger(__name__)


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
        self._cancel_signal = threading.Event()
        margin_s = self.settings.margin_ms / 1e3
        self._num_runners = self.settings.runners or (None if _shares_threads(self.device) else 1)
        self._loop = DeviceLoop(
            _scheduler(self.settings, 0 if self._num_runners else self.device.threads),
            observer=self._observer,
            clock=clock,
            margin_s=margin_s,
            on_settled=self._on_settled,
            cancel_signal=self._cancel_signal,
        )
        self._admission = Admission(self.settings, self._loop.num_unseen)
        self._models: tuple[ServedModel, ...] = ()
        self._is_draining = False
        self._runners = Runners(self._loop, self._num_runners or min(self.device.threads, MOST_ABREAST))
        # A session on a GPU keeps state, captured graphs among it, for each thread that runs it.
        self._inline_s = self.settings.inline_ms / 1e3 if self.device.name == "cpu" else 0.0

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
        return self._runners.why_ended or ("the engine is draining" if self._is_draining else None)

    @property
    def is_ready(self) -> bool:
        """Whether requests are admitted."""
        return self.why_not_ready is None

    @property
    def is_alive(self) -> bool:
        """Whether the engine's threads run; false means that only a restart helps."""
        return self._runners.is_alive

    @property
    def num_inflight(self) -> int:
        """Admitted, unanswered rows."""
        return self._admission.num_inflight()

    def add_model(self, bundle: Bundle, name: str | None = None, default: Choice | None = None) -> ServedModel:
        """Load a bundle, warm it up and profile it while the others go on serving; blocks until it is ready.

        Args:
            bundle: What to load.
            name: What to call it; None takes the manifest's name.
            default: What serves requests that choose nothing, and so is gear 0; None is the bundle's default policy.

        Raises:
            ManifestError: If a graph cannot be loaded or does not fit the manifest.
            NotReady: If the engine is closed or dies meanwhile.
        """
        name = name or bundle.manifest.name
        ladder = ladder_under(self.settings, name, bundle, default)
        served = ServedModel(name, bundle, self.device, self.settings.max_batch, ladder, runners=self._num_runners)
        self._runners.do(served.warm_up(self._clock, self.settings.warm_up_s))
        if served.narrow is not None:
            logger.info(
                "model %s: up to %d stages run side by side while many rows wait, %d threads each",
                name,
                served.narrow.num_abreast,
                served.narrow.num_threads,
            )
        self._observer.model_added(served.loaded)
        self._runners.command(lambda: self._loop.add_model(served))
        with self._runners.wakeup:
            self._models = (*self._models, served)
        self._observer.inflight_changed(served.name, served.version, 0)
        return served

    def remove_model(self, served: ServedModel, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Stop admitting requests for a model, let those in flight finish, and unload it."""
        with self._runners.wakeup:  # a request is admitted under this lock: none slips in behind the wait below
            self._models = tuple(model for model in self._models if model is not served)
        self._admission.wait_until_empty(served, timeout_s)
        error = NotReady(f"model {served.name!r} was unloaded")
        self._runners.command(lambda: self._unload(served, error))

    def submit(
        self,
        served: ServedModel,
        inputs: dict[str, np.ndarray],
        options: RequestOptions,
        listener: Listener,
        arrival_s: float | None = None,
        *,
        wake: bool = True,
    ) -> Submission:
        """Admit a request.

        Args:
            served: One of `models`.
            inputs: One array per model input, checked against the manifest, all with the same number of rows >= 1.
            options: How its rows are routed.
            listener: Gets its events, the last of which is its one `Result`.
            arrival_s: When it arrived, on the engine's clock; now if not given.
            wake: Whether its rows start now. Who says no calls `start` soon.

        Raises:
            NotReady: If the engine is draining, closed or dead, or the model is not loaded (any more).
            TooLarge, Overloaded, DeadlineExceeded: See `Admission.admit`.
        """
        now = self._clock()
        arrived = now if arrival_s is None else arrival_s
        budget_ms = self.settings.default_latency_ms if options.latency_ms is None else options.latency_ms
        options, gear = served.in_gear(options, now)
        submission = Submission(
            served,
            inputs,
            options,
            listener=listener,
            arrival_s=arrived,
            budget_ms=budget_ms,
            cancel_signal=self._cancel_signal,
            gear=gear,
        )
        try:
            with self._runners.wakeup:
                self._refuse_unless_ready(served)
                submission.lot, num_inflight = self._admission.admit(
                    served, submission.num_rows, options, submission.deadline_s - now, now=now, gear=gear
                )
                if gear is not None and gear != self.gear_of(served):
                    self.report_gears()
                # Told before the engine can answer, so that the last number told is that of the last answer.
                self._observer.inflight_changed(served.name, served.version, num_inflight)
                self._runners.command(lambda: self._loop.enqueue(submission, now), wake=wake)
        except OfframpError as error:
            self._observer.rejected(served.name, served.version, error.code)
            raise
        return submission

    def start(self, submissions: Sequence[Submission]) -> None:
        """Start requests that were submitted with `wake=False`, whose answers may have come when this returns."""
        first = submissions[0]
        is_alone = len(submissions) == 1 and first.num_rows == 1
        if is_alone and first.served.profile.alone_s <= self._inline_s:
            self._runners.work_off(len(first.served.profile.stages))
        else:
            self._runners.wake()

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

    def gear_of(self, served: ServedModel) -> int | None:
        """Give the gear that a model is in; None if it has none."""
        return None if served.gears is None else served.gears.at(self._clock())

    def report_gears(self) -> None:
        """Tell the observer each model's gear: without requests it falls unseen."""
        for served in self._models:
            gear = self.gear_of(served)
            if gear is not None:
                self._observer.gear_changed(served.name, served.version, gear)

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and let those in flight finish; false if that takes longer than the timeout."""
        with self._runners.wakeup:  # as in `remove_model`
            self._is_draining = True
        return self._admission.wait_until_empty(None, timeout_s)

    def close(self) -> None:
        """Stop the threads; requests still in flight are answered with `NotReady`."""
        self._runners.stop()

    def _refuse_unless_ready(self, served: ServedModel) -> None:
        reason = self.why_not_ready
        if reason is not None:
            raise NotReady(reason)
        if served not in self._models:
            raise NotReady(f"model {served.name!r} is not loaded")

    def _unload(self, served: ServedModel, error: OfframpError) -> None:
        self._loop.remove_model(served, error)
        self._observer.model_removed(served.name, served.version)

    def _on_settled(self, lot: Lot, num_rows: int) -> None:
        served, left = lot.served, self._admission.release(lot, num_rows)
        self._observer.inflight_changed(served.name, served.version, left)


def _shares_threads(device: Device) -> bool:
    """Whether dispatches can each take a part of a device's threads."""
    return device.threads > 1 and device.part(1) is not None


def _scheduler(settings: EngineSettings, num_threads: int) -> Scheduler[Sample]:
    timeout_ms = settings.batch_timeout_ms
    rules = Rules(
        rebatch=settings.rebatch,
        hold=settings.hold,
        batch_timeout_s=None if timeout_ms is None else timeout_ms / 1e3,
        forced_exits=settings.forced_exits,
    )
    fair_share_s = settings.fair_share_ms / 1e3
    return Scheduler(settings.max_batch, settings.margin_ms / 1e3, fair_share_s, rules, num_threads)
