"""Who may come in: counts the rows in flight, predicts how long a new one would wait, and shifts the models' gears.

Rows run in the order of their deadlines, so a row waits for those whose budget is no longer than its own. Rows in
flight are therefore counted in lots of equal model and gear and about equal budget, and predictions are sums over lots,
however many rows there are.
"""

import math
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from offramp_contract.errors import DeadlineExceeded, Overloaded, TooLarge

from offramp_server.engine_settings import EngineSettings
from offramp_server.messages import RequestOptions
from offramp_server.served import ServedModel

LEAST_RETRY_AFTER_S: Final = 0.05
MAX_RETRY_AFTER_S: Final = 60.0
LOAD_WINDOW_S: Final = 4.0
OVERLOAD: Final = 0.9
"""Load from which on a request that will probably be late is refused; below, who may be late is answered late."""
LEAST_SEEN: Final = 0.05
"""Share of the window before which the load is not told from what the first requests bring."""
BUDGETS_PER_OCTAVE: Final = 4
"""Classes of budgets from each to its double. The first holds all up to 1 ms, the last all from `LONGEST_MS` on."""
LONGEST_MS: Final = 2.0**14


@dataclass(slots=True, eq=False)
class Lot:
    """Rows in flight that were admitted alike.

    Attributes:
        served: Their model.
        gear: The gear they were admitted in; None where the request chose for itself.
        budget: The class of what was left of their budget when they were admitted.
        num_rows: How many there are.
    """

    served: ServedModel
    gear: int | None
    budget: int
    num_rows: int = 0


class Admitted(NamedTuple):
    """What became of rows that were let in.

    Attributes:
        lot: Where they are counted; whoever answers them gives it back to `release`.
        num_inflight: The model's rows in flight, these included.
    """

    lot: Lot
    num_inflight: int


class _Queue(NamedTuple):
    """What a new row meets.

    Attributes:
        wait_s: Device seconds of everything in flight.
        asked_s: Of what runs before it, if no deadline cuts it short.
        first_s: Of what runs before it, up to the first exit of each row.
    """

    wait_s: float
    asked_s: float
    first_s: float


class Admission:
    """Admits rows up to the operator's limits. Thread-safe.

    Args:
        settings: The limits.
        num_unseen: Counts the rows of a model that wait and have not seen an exit yet.
    """

    def __init__(self, settings: EngineSettings, num_unseen: Callable[[ServedModel], int] | None = None) -> None:
        self._settings = settings
        self._max_wait_s = settings.max_wait_ms / 1e3
        self._margin_s = settings.margin_ms / 1e3
        self._num_unseen = num_unseen
        # Where dispatches share threads, a row's seconds are reckoned with all of these.
        self._num_runners = settings.runners or 1
        self._lock = threading.Lock()
        self._inflight: Counter[ServedModel] = Counter()
        self._num_inflight = 0
        self._lots: dict[tuple[ServedModel, int | None, int], Lot] = {}
        self._load, self._seen, self._loaded_s = 0.0, 0.0, math.inf
        self.changed = threading.Condition(self._lock)

    def num_inflight(self, served: ServedModel | None = None) -> int:
        """Count the admitted, unanswered rows of one model, or of all."""
        with self._lock:
            return self._num_inflight if served is None else self._inflight[served]

    def admit(
        self,
        served: ServedModel,
        num_rows: int,
        options: RequestOptions,
        remaining_s: float,
        *,
        now: float,
        gear: int | None = None,
    ) -> Admitted:
        """Count a request's rows in, or refuse them; what they meet decides the gear of those who come next.

        Args:
            served: The model they are for.
            num_rows: How many there are.
            options: How they are routed.
            remaining_s: Seconds to their deadline.
            now: The time, on the clock of the model's gears.
            gear: The one they run in; None if the request chose for itself.

        Raises:
            TooLarge: If there are more rows than may ever be in flight.
            Overloaded: If too many rows are in flight, the predicted wait is too long, or, under overload or where the
                request would rather be refused, so many rows come first that not even the first exit can be reached in
                time.
            DeadlineExceeded: If not even an idle device reaches the first exit in time and the request would rather be
                refused.
        """
        limit = self._settings.max_inflight_samples
        if num_rows > limit:
            raise TooLarge(f"inputs: at most {limit} rows may be in flight; got {num_rows}", field="inputs")
        alone_s = served.profile.to_next_answer_s(served.profile.trunk_from(0), 1) + self._margin_s
        is_reachable = alone_s <= remaining_s
        if not is_reachable and options.on_miss == "reject":
            raise DeadlineExceeded("latency_ms: the deadline passes before the first exit can answer")
        budget = _class_of(remaining_s)
        with self._lock:
            queue = self._queue_before(budget)
            load = self._load_with(num_rows * served.costs.of(gear).asked_s / self._num_runners, now)
            if served.gears is not None and is_reachable:
                served.gears.observe(queue.asked_s, min(remaining_s, self._max_wait_s), load, now)
            self._refuse_overload(num_rows, queue)
            would_rather = load >= OVERLOAD or options.on_miss == "reject"
            if would_rather and is_reachable and queue.first_s + alone_s > remaining_s:
                self._refuse_late(served, queue, remaining_s - alone_s)
            lot = self._lots.get((served, gear, budget))
            if lot is None:
                lot = self._lots[served, gear, budget] = Lot(served, gear, budget)
            lot.num_rows += num_rows
            self._num_inflight += num_rows
            self._inflight[served] += num_rows
            return Admitted(lot, self._inflight[served])

    def release(self, lot: Lot, num_rows: int) -> int:
        """Count answered rows out; gives the model's rows still in flight."""
        served = lot.served
        with self._lock:
            lot.num_rows -= num_rows
            if not lot.num_rows:
                del self._lots[served, lot.gear, lot.budget]
            self._num_inflight -= num_rows
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
                lambda: not (self._num_inflight if served is None else self._inflight[served]), timeout_s
            )

    def _load_with(self, work_s: float, now: float) -> float:
        """Give the share of the device's time that has lately been asked for, with what comes now."""
        kept = math.exp(min(self._loaded_s - now, 0.0) / LOAD_WINDOW_S)
        self._loaded_s = now if math.isinf(self._loaded_s) else max(self._loaded_s, now)
        self._load = kept * self._load + work_s / LOAD_WINDOW_S
        self._seen = kept * self._seen + (1.0 - kept)
        return self._load / max(self._seen, LEAST_SEEN)

    def _queue_before(self, budget: int) -> _Queue:
        """Look at what a row meets. Those of the next class come first too if they came a little earlier.

        That also keeps requests together that ask for the same and have been on the way for different times.
        """
        wait_s = asked_s = first_s = 0.0
        for lot in self._lots.values():
            num_rows, cost = lot.num_rows, lot.served.costs.of(lot.gear)
            wait_s += num_rows * cost.taken_s
            if lot.budget <= budget + 1:
                asked_s += num_rows * cost.asked_s
                first_s += num_rows * cost.first_s
        num_runners = self._num_runners
        return _Queue(wait_s / num_runners, asked_s / num_runners, first_s / num_runners)

    def _refuse_overload(self, num_rows: int, queue: _Queue) -> None:
        """Raise if the operator's limits on rows or on the predicted wait are reached."""
        limit, num_inflight = self._settings.max_inflight_samples, self._num_inflight
        if num_inflight + num_rows > limit:
            to_go = (num_inflight + num_rows - limit) / num_inflight
            raise Overloaded(f"{limit} rows are in flight already", _retry_after_s(queue.wait_s * to_go))
        if queue.wait_s > self._max_wait_s:
            raise Overloaded("the predicted wait is too long", _retry_after_s(queue.wait_s - self._max_wait_s))

    def _refuse_late(self, served: ServedModel, queue: _Queue, spare_s: float) -> None:
        """Raise if the rows that come first, but for those that have an answer already, take longer than can be spared.

        Counting those takes a look at the scheduler, so it is done only where it may decide.
        """
        first_s = queue.first_s
        if self._num_unseen is not None:
            unseen_s = sum(self._num_unseen(other) * other.costs.of(None).first_s for other in self._inflight)
            first_s = min(first_s, unseen_s / self._num_runners)
        if first_s > spare_s:
            raise Overloaded(
                "latency_ms: so many rows come first that the deadline passes before the first exit can answer",
                _retry_after_s(first_s - spare_s),
            )


def _class_of(budget_s: float) -> int:
    return int(BUDGETS_PER_OCTAVE * math.log2(min(max(budget_s * 1e3, 1.0), LONGEST_MS)))


def _retry_after_s(predicted_s: float) -> float:
    """Give the seconds until what is predicted has run, if nothing else comes."""
    if math.isnan(predicted_s):
        return MAX_RETRY_AFTER_S
    return min(max(predicted_s, LEAST_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
