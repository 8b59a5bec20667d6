"""Who may come in: counts the rows in flight and predicts how long a new one would wait for the device."""

import threading
from collections import Counter

from offramp_contract.errors import DeadlineExceeded, Overloaded, TooLarge

from offramp_server.engine_settings import EngineSettings
from offramp_server.messages import RequestOptions
from offramp_server.served import ServedModel

LEAST_RETRY_AFTER_S = 0.05


class Admission:
    """Admits rows up to the operator's limits. Thread-safe."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._inflight: Counter[ServedModel] = Counter()
        self.changed = threading.Condition(self._lock)

    def num_inflight(self, served: ServedModel | None = None) -> int:
        """Count the admitted, unanswered rows of one model, or of all."""
        with self._lock:
            return self._inflight.total() if served is None else self._inflight[served]

    def admit(self, served: ServedModel, num_rows: int, options: RequestOptions, remaining_s: float) -> int:
        """Count a request's rows in, or refuse them.

        Args:
            served: The model they are for.
            num_rows: How many there are.
            options: How they are routed.
            remaining_s: Seconds to their deadline.

        Returns:
            The model's rows in flight, these included.

        Raises:
            TooLarge: If there are more rows than may ever be in flight.
            Overloaded: If too many rows are in flight or the predicted wait is too long.
            DeadlineExceeded: If not even the first exit can be reached in time and the request would rather be refused.
        """
        limit = self._settings.max_inflight_samples
        if num_rows > limit:
            raise TooLarge(f"inputs: at most {limit} rows may be in flight; got {num_rows}", field="inputs")
        profile = served.profile
        first_s = profile.to_next_answer_s(profile.trunk_from(0), 1) + self._settings.margin_ms / 1e3
        if options.on_miss == "reject" and first_s > remaining_s:
            raise DeadlineExceeded("latency_ms: the deadline passes before the first exit can answer")
        with self._lock:
            wait_s = sum(count * model.profile.row_s for model, count in self._inflight.items())
            over_s = wait_s - self._settings.max_wait_ms / 1e3
            if self._inflight.total() + num_rows > limit:
                raise Overloaded(f"{limit} rows are in flight already", max(wait_s / 2, LEAST_RETRY_AFTER_S))
            if over_s > 0:
                raise Overloaded("the predicted wait is too long", max(over_s, LEAST_RETRY_AFTER_S))
            self._inflight[served] += num_rows
            return self._inflight[served]

    def release(self, served: ServedModel, num_rows: int) -> int:
        """Count answered rows out; gives the model's rows still in flight."""
        with self._lock:
            self._inflight[served] -= num_rows
            left = self._inflight[served]
            if not left:
                del self._inflight[served]
                self.changed.notify_all()
            return left

    def wait_until_empty(self, served: ServedModel | None, timeout_s: float) -> bool:
        """Block until no row (of one model, or at all) is in flight; false if that takes longer than the timeout."""
        with self._lock:
            return self.changed.wait_for(
                lambda: not (self._inflight.total() if served is None else self._inflight[served]), timeout_s
            )
