"""What gears and admission make of more load than the device can serve: a simulation in discrete events.

The scheduler, admission, gears and costs are the server's own; time is a number. The network has five exits of equal
cost. A row is as difficult as a number from 0 to 1 says: an operating point lets the easier ones leave earlier, and an
exit is right about those whose difficulty, give or take, is below its accuracy.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from offramp_contract.calibration import OperatingPoint
from offramp_contract.errors import Overloaded
from offramp_contract.policy_spec import FixedSpec
from offramp_server.admission import Admission
from offramp_server.engine_settings import EngineSettings
from offramp_server.gears import Gears
from offramp_server.ladder import Gear
from offramp_server.profile import Profile
from offramp_server.row_costs import RowCosts
from offramp_server.scheduler import Dispatch, QueueKey, Scheduler
from offramp_server.widths import Width

ACCURACIES = (0.60, 0.66, 0.70, 0.73, 0.75)
NUM_EXITS = len(ACCURACIES)
DEPTHS = [(exit_index + 1) / NUM_EXITS for exit_index in range(NUM_EXITS)]
FULL_S = 0.005
CAPACITY = 1 / FULL_S
BUDGET_S = 0.05
MAX_BATCH = 16
DEFAULT_COMPUTE, CHEAPEST_COMPUTE, NUM_GEARS = 0.6, 0.24, 12
SETTINGS = EngineSettings(max_batch=MAX_BATCH)
MARGIN_S = SETTINGS.margin_ms / 1e3


class Served(SimpleNamespace):
    """A model without a network."""

    __hash__ = object.__hash__


@dataclass(eq=False)
class Row:
    """One request of one row."""

    arrival_s: float
    deadline_s: float
    gear: int
    wanted_exit: int
    limit: float
    lot: Any = None
    seen: int = -1
    may_be_dropped: bool = False
    is_cancelled: bool = False


@dataclass
class Report:
    """What became of the rows."""

    num_rows: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    gears: list[int] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)

    def share(self, outcome: str) -> float:
        return self.outcomes[outcome] / self.num_rows


def point_at(compute: float) -> OperatingPoint:
    """Give the point of MSDNet's budgeted-batch rule, exit shares in geometric progression, at an average cost."""
    low, high = 1e-4, 1e4
    while high / low > 1.0001:
        ratio = math.sqrt(low * high)
        rates = [ratio**exit_index for exit_index in range(NUM_EXITS)]
        rates = [rate / sum(rates) for rate in rates]
        mean = sum(rate * depth for rate, depth in zip(rates, DEPTHS, strict=True))
        low, high = (ratio, high) if mean < compute else (low, ratio)
    return OperatingPoint(
        name=f"c{compute:.3f}", policy=FixedSpec(exit=0), compute=mean, accuracy=0.7, exit_rates=tuple(rates)
    )


LADDER = tuple(
    Gear(point.policy, None, point)  # type: ignore[arg-type]  # nobody compiles it: the rates decide
    for step in range(NUM_GEARS)
    for point in [point_at(DEFAULT_COMPUTE * (CHEAPEST_COMPUTE / DEFAULT_COMPUTE) ** (step / (NUM_GEARS - 1)))]
)


class Simulation:
    """One device that serves one model.

    Args:
        is_full: Every row asks for the final exit, and no deadline cuts it short.
        has_gears: Whether the load moves the gears.
        seed: Of arrivals, difficulties and the device's jitter.
    """

    def __init__(self, *, is_full: bool = False, has_gears: bool = True, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.is_full = is_full
        self.report = Report()
        self.now = 0.0
        profile = Profile(range(NUM_EXITS), NUM_EXITS, MAX_BATCH)
        for stage in profile.stages:
            for batch in range(1, MAX_BATCH + 1):
                stage.calibrate(batch, [seconds_of(batch)])
        manifest: Any = SimpleNamespace(exits=[SimpleNamespace(stage=stage) for stage in range(NUM_EXITS)], gates=())
        self.served: Any = Served(profile=profile, costs=RowCosts(manifest, profile, LADDER))
        self.served.gears = Gears(NUM_GEARS, self.served.costs.asked_s) if has_gears and not is_full else None
        self.keys = [QueueKey("m", stage) for stage in range(NUM_EXITS)]
        self.scheduler: Scheduler[Row] = Scheduler(MAX_BATCH, MARGIN_S, 0.05)
        self.scheduler.add_model(self.keys, Width(profile))
        self.admission = Admission(SETTINGS, lambda _: self.scheduler.num_waiting(self.keys[0]))

    def serve(self, arrivals: list[float]) -> Report:
        """Serve rows that arrive at these times, to the last."""
        coming = iter(arrivals)
        following = next(coming, math.inf)
        while True:
            while following <= self.now:
                self.arrive(following)
                following = next(coming, math.inf)
            if not self.is_full:
                for row in self.scheduler.take_expired(self.now):
                    self.leave(row, is_forced=True)
            dispatch = self.scheduler.next(self.now)
            if dispatch is None and following == math.inf:
                return self.report
            if dispatch is None:
                self.now = following
                continue
            end_s = self.now + seconds_of(len(dispatch.samples)) * self.random.uniform(0.97, 1.1)
            while following <= end_s:
                self.arrive(following)
                following = next(coming, math.inf)
            self.now = end_s
            self.finish(dispatch)

    def arrive(self, now: float) -> None:
        gear = 0 if self.served.gears is None else self.served.gears.at(now)
        self.report.num_rows += 1
        self.report.gears.append(gear)
        difficulty, wanted_exit, left = self.random.random(), 0, 0.0
        for wanted_exit, rate in enumerate(LADDER[gear].point.exit_rates):  # type: ignore[union-attr]  # noqa: B007
            left += rate
            if difficulty <= left:
                break
        if self.is_full:
            wanted_exit = NUM_EXITS - 1
        row = Row(now, now + BUDGET_S, gear, wanted_exit, difficulty + self.random.gauss(0, 0.1))
        options: Any = SimpleNamespace(on_miss="answer")
        try:
            row.lot, _ = self.admission.admit(self.served, 1, options, BUDGET_S, now=now, gear=gear)
        except Overloaded:
            self.report.outcomes["refused"] += 1
        else:
            self.scheduler.put(self.keys[0], [row])

    def finish(self, dispatch: Dispatch[Row]) -> None:
        stage, rows = dispatch.key.stage, dispatch.samples
        staying = []
        for row in rows:
            row.seen = stage
            if stage == row.wanted_exit:
                self.leave(row, is_forced=False)
            elif not self.is_full and self.next_exit_by_s(stage + 1, len(rows)) > row.deadline_s:
                self.leave(row, is_forced=True)
            else:
                staying.append(row)
        if staying:
            self.scheduler.put(self.keys[stage + 1], staying)

    def next_exit_by_s(self, stage: int, num_rows: int) -> float:
        likely = min(num_rows + self.scheduler.num_waiting(self.keys[stage]), self.served.profile.knee(stage))
        return self.now + float(self.served.profile.to_next_answer_s(stage, likely)) + MARGIN_S

    def leave(self, row: Row, *, is_forced: bool) -> None:
        is_on_time, is_right = self.now <= row.deadline_s, row.limit < ACCURACIES[row.seen]
        outcomes = {"forced": is_forced, "on time": is_on_time, "on time and right": is_on_time and is_right}
        self.report.outcomes.update(outcome for outcome, is_so in outcomes.items() if is_so)
        self.report.latencies_s.append(self.now - row.arrival_s)
        self.served.costs.observe(row.gear, row.seen, DEPTHS[row.seen], is_forced=is_forced)
        self.admission.release(row.lot, 1)


def seconds_of(batch: int) -> float:
    """A stage on a CPU: some overhead, then so much a row."""
    return 0.0002 + batch * (FULL_S / NUM_EXITS - 0.0002)


def arrivals(load: float, seconds: float, *, cv2: float = 1.0, seed: int = 1, start: float = 0.0) -> list[float]:
    """Draw times of arrival at a multiple of the full-depth capacity; Poisson, or gamma with another CV squared."""
    draw, times, now = random.Random(seed), [], start
    while now < start + seconds:
        now += draw.gammavariate(1 / cv2, cv2 / (load * CAPACITY))
        times.append(now)
    return times


@pytest.mark.parametrize("cv2", [1.0, 4.0], ids=["poisson", "bursty"])
@pytest.mark.parametrize(("load", "times_as_often"), [(1.3, 1.5), (2.0, 2.0), (3.0, 2.0)])
def test_overload_is_served_on_time_and_right_far_more_often_than_at_full_depth(load, times_as_often, cv2):
    times = arrivals(load, 10.0, cv2=cv2)
    geared, full = Simulation().serve(times), Simulation(is_full=True).serve(times)
    assert geared.share("on time") >= 0.99
    assert geared.share("on time and right") >= times_as_often * full.share("on time and right")


def test_with_gears_it_is_the_certified_point_that_decides_and_hardly_ever_the_deadline():
    times = arrivals(2.5, 10.0)
    geared, ungeared = Simulation().serve(times), Simulation(has_gears=False).serve(times)
    assert geared.share("forced") < 0.03
    assert ungeared.share("forced") > 0.2
    assert geared.share("on time") >= ungeared.share("on time")


@pytest.mark.parametrize("load", [0.4, 0.8, 0.95])
def test_a_load_that_full_depth_can_serve_leaves_every_request_in_gear_0(load):
    assert set(Simulation().serve(arrivals(load, 10.0)).gears) == {0}


def test_more_load_means_a_higher_gear():
    settled = [sum(Simulation().serve(arrivals(load, 8.0)).gears[-500:]) for load in (0.9, 1.8, 2.4, 3.2)]
    assert settled == sorted(settled)
    assert settled[0] == 0


def test_a_steady_overload_does_not_swing_between_gears():
    gears = Simulation().serve(arrivals(2.0, 20.0)).gears
    settled = gears[len(gears) // 2 :]
    shifts = sum(before != after for before, after in pairwise(settled))
    assert shifts <= 10
    assert max(settled) - min(settled) <= 3


def test_when_the_overload_is_over_requests_get_again_what_they_got_before():
    times = arrivals(3.0, 4.0) + arrivals(0.7, 20.0, start=4.0)
    report = Simulation().serve(times)
    assert max(report.gears) >= 6
    assert set(report.gears[-1000:]) == {0}
    assert report.share("on time") >= 0.99


def test_what_not_even_first_exits_can_serve_is_refused_at_once_and_the_rest_is_on_time():
    """Eight times what full depth can do is 1.6 times what the first exit can."""
    report = Simulation().serve(arrivals(8.0, 5.0))
    assert 0.3 < report.share("refused") < 0.5
    assert report.share("on time") >= 0.85 * (1 - report.share("refused"))
