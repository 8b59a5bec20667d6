"""One stretch of load on one server, and the numbers that are kept of it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from goodput_configurations import Configuration
from goodput_data import TestSet
from offramp_cli.server_process import server_process
from offramp_loadtest import Difficulty, LoadTest, Phase, Scenario, run
from rich.progress import track

PERCENTILES = ("p50", "p95", "p99", "p99.9")
CONNECTIONS = 1000
"""Just below what a server accepts by default; what is due beyond that waits, and the wait counts."""


@dataclass(frozen=True, slots=True)
class Load:
    """What every run of a series has in common.

    Attributes:
        asking: The model, and over which API.
        capacity: Rows per second at full depth, μ.
        slo_ms: The latency budget of every request.
        seconds: How long requests are due; the inputs go once from middling to hard to easy and back.
    """

    asking: Scenario
    capacity: float
    slo_ms: float
    seconds: float

    def scenario(self, configuration: Configuration, rho: float, seed: int) -> Scenario:
        """Give one run's scenario; all configurations get the same arrivals and inputs from the same seed."""
        budget = {"latency_ms": self.slo_ms} if configuration.has_budget else {}
        return self.asking.changed(
            name=f"{configuration.name} at {rho:g}"[:100],
            seed=seed,
            fields={**configuration.fields, **budget},
            slo_ms=self.slo_ms,
            connections=CONNECTIONS,
            capacity=self.capacity,
            phases=(Phase(seconds=self.seconds, load=rho),),
            difficulty=Difficulty(drift="sine", period_s=self.seconds),
        )


@dataclass(frozen=True, slots=True)
class Point:
    """One run: a configuration at a load.

    Attributes:
        configuration: Its name.
        rho: Offered load as a share of full depth's capacity.
        seed: Of the run; the pass.
        arrivals, offered_rate: Requests that were due, and per second.
        outcomes: Requests by what became of them.
        correct_goodput: Answers per second that were on time and right.
        goodput: Answers per second that were on time.
        attainment: Share of all arrivals answered on time.
        accuracy: Share of right ones among the answered.
        rejected: Share of arrivals that were refused.
        forced: Share of answers that a deadline forced.
        mean_depth: Average share of full depth's FLOPs.
        mean_batch: Rows in a dispatch, over all stages.
        latency_ms, queue_ms, compute_ms: Percentiles of the answered.
        lag_p99_ms: How far the client itself was behind.
        exits, gears: Answers by exit and by gear.
    """

    configuration: str
    rho: float
    seed: int
    arrivals: int
    offered_rate: float
    outcomes: dict[str, int]
    correct_goodput: float
    goodput: float
    attainment: float
    accuracy: float | None
    rejected: float
    forced: float | None
    mean_depth: float | None
    mean_batch: float | None
    latency_ms: dict[str, float]
    queue_ms: dict[str, float]
    compute_ms: dict[str, float]
    lag_p99_ms: float
    exits: dict[str, int]
    gears: dict[str, int]

    @classmethod
    def of(cls, configuration: Configuration, rho: float, ran: LoadTest) -> "Point":
        """Keep what the report tells of a run."""
        found = ran.summary
        refused = found.outcomes["rejected"] + found.outcomes["deadline"]
        return cls(
            configuration=configuration.name,
            rho=rho,
            seed=found.seed,
            arrivals=found.arrivals,
            offered_rate=found.offered_rate,
            outcomes={name: count for name, count in found.outcomes.items() if count},
            correct_goodput=found.correct_goodput or 0.0,
            goodput=found.goodput or 0.0,
            attainment=found.attainment or 0.0,
            accuracy=found.accuracy,
            rejected=refused / found.arrivals,
            forced=found.forced,
            mean_depth=found.mean_depth,
            mean_batch=_mean_batch(ran),
            latency_ms=_kept(found.latency_ms),
            queue_ms=_kept(found.queue_ms),
            compute_ms=_kept(found.compute_ms),
            lag_p99_ms=found.client_lag_ms["p99"],
            exits=found.exits,
            gears=found.gears,
        )


def _kept(percentiles: Mapping[str, float]) -> dict[str, float]:
    return {name: round(percentiles[name], 3) for name in PERCENTILES if name in percentiles}


def _mean_batch(ran: LoadTest) -> float | None:
    if ran.summary.server is None:
        return None
    stages = ran.summary.server.stages.values()
    dispatches = sum(stage.num_dispatches for stage in stages)
    return sum(stage.num_dispatches * stage.mean_rows for stage in stages) / dispatches if dispatches else None


@contextmanager
def served(
    bundle: Path, configurations: Sequence[Configuration], flags: Sequence[str], logs: Path
) -> Iterator[dict[str, str]]:
    """Start a server for each configuration, one after another so that none disturbs another's warm-up.

    Each keeps its process for the whole series: what one has learnt of its rows' costs is no other's.

    Yields:
        The URL of each, by the configuration's name.
    """
    with ExitStack() as stack:
        urls = {}
        for number, configuration in enumerate(track(configurations, "starting servers")):
            log = logs / f"{number:02}.log"
            urls[configuration.name] = stack.enter_context(server_process(bundle, log, (*flags, *configuration.flags)))
        yield urls


def measure(
    urls: Mapping[str, str],
    configurations: Sequence[Configuration],
    load: Load,
    inputs: TestSet,
    *,
    rhos: Sequence[float],
    passes: int,
) -> list[Point]:
    """Run every configuration at every load, so many times over.

    Neighbours in time are the same load on different servers, each pass begins with another, so that a noisy minute of
    the machine falls on all.
    """
    order: list[tuple[int, float, Configuration]] = []
    for seed in range(passes):
        turned = [*configurations[seed:], *configurations[:seed]]
        order += [(seed, rho, configuration) for rho in rhos for configuration in turned]
    points = []
    for seed, rho, configuration in track(order, f"{load.asking.model} under load"):
        payloads = inputs.by_oracle if configuration.asks_by_row else inputs.payloads
        scenario = load.scenario(configuration, rho, seed)
        points.append(Point.of(configuration, rho, run(urls[configuration.name], scenario, payloads)))
    return points


def written(point: Point) -> dict[str, Any]:
    """Give a point as JSON types, without what every slot says of itself."""
    return {name: getattr(point, name) for name in Point.__slots__}
