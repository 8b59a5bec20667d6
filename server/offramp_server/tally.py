"""Counts what one loaded model has done, for those who ask by the model rather than through metrics."""

import time
from dataclasses import dataclass, field

from offramp_server.messages import Outcome, Result


@dataclass(slots=True)
class Timed:
    """A number of events and the seconds they took together."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one more event."""
        self.count += 1
        self.seconds += seconds


@dataclass(slots=True)
class Tally:
    """What a model has done since it was loaded. One thread writes; a reader may see a request half counted.

    Attributes:
        answered: Requests whose every row was answered, from arrival to answer.
        failed: Admitted requests with a row whose answer is an error, from arrival to answer.
        queue: Of answered requests, what their slowest row waited for the device.
        compute: Of answered requests, what their slowest row's stages ran.
        num_rows: Rows of answered requests.
        num_executions: Dispatches of the first stage that no row does without; every row is in one of them.
        dispatches: Dispatches of any stage, by number of rows.
        last_answer_s: When the last request got its answer, Unix time; 0 if none did.
    """

    answered: Timed = field(default_factory=Timed)
    failed: Timed = field(default_factory=Timed)
    queue: Timed = field(default_factory=Timed)
    compute: Timed = field(default_factory=Timed)
    num_rows: int = 0
    num_executions: int = 0
    dispatches: dict[int, Timed] = field(default_factory=dict)
    last_answer_s: float = 0.0

    def count_dispatch(self, num_rows: int, seconds: float, *, is_first: bool) -> None:
        """Count one run of a stage, and whether it is the first that no row does without."""
        self.num_executions += is_first
        timed = self.dispatches.get(num_rows)
        if timed is None:
            timed = self.dispatches[num_rows] = Timed()
        timed.add(seconds)

    def count_request(self, result: Result, outcome: Outcome) -> None:
        """Count one request that has got its answer."""
        self.last_answer_s = time.time()
        if outcome != "ok":
            self.failed.add(result.total_s)
            return
        self.answered.add(result.total_s)
        self.queue.add(result.queue_s)
        self.compute.add(result.compute_s)
        self.num_rows += len(result.rows)
