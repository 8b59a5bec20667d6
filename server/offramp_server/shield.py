"""Keeps whoever listens to the engine from hurting it: what a listener or an observer raises is logged, and no more."""

import logging
from collections.abc import Callable
from typing import ParamSpec

from offramp_server.messages import Departure, Loaded, Observer, RequestDone, StageRun

logger = logging.getLogger(__name__)
P = ParamSpec("P")


def tell(told: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call someone who is told about the engine's work and has no say in it."""
    try:
        told(*args, **kwargs)
    except Exception:
        # Answers are owed to everyone else too: no outsider's mistake may end the engine's thread.
        logger.exception("%r raised", told)


class ShieldedObserver:
    """Passes on what happens to an observer that may raise."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def model_added(self, loaded: Loaded) -> None:
        """Pass it on."""
        tell(self._observer.model_added, loaded)

    def model_removed(self, model: str, version: str) -> None:
        """Pass it on."""
        tell(self._observer.model_removed, model, version)

    def stage_ran(self, run: StageRun) -> None:
        """Pass it on."""
        tell(self._observer.stage_ran, run)

    def rows_left(self, departures: list[Departure]) -> None:
        """Pass it on."""
        tell(self._observer.rows_left, departures)

    def rows_failed(self, model: str, version: str, reason: str, num_samples: int) -> None:
        """Pass it on."""
        tell(self._observer.rows_failed, model, version, reason, num_samples)

    def request_done(self, done: RequestDone) -> None:
        """Pass it on."""
        tell(self._observer.request_done, done)

    def rejected(self, model: str, version: str, reason: str) -> None:
        """Pass it on."""
        tell(self._observer.rejected, model, version, reason)

    def inflight_changed(self, model: str, version: str, num_samples: int) -> None:
        """Pass it on."""
        tell(self._observer.inflight_changed, model, version, num_samples)

    def gear_changed(self, model: str, version: str, gear: int) -> None:
        """Pass it on."""
        tell(self._observer.gear_changed, model, version, gear)
