"""A scenario: everything that a load test does to a server, but for the server's address and its secrets."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from offramp_loadtest.errors import LoadTestError
from offramp_loadtest.targets import Api, Body

MAX_ARRIVALS: Final = 1_000_000
MAX_SECONDS: Final = 24 * 3600.0
MAX_PHASES: Final = 1000
MAX_SCENARIO_BYTES: Final = 2**20

ArrivalKind = Literal["poisson", "gamma", "fixed", "trace"]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
Share = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    """What all parts of a scenario are: immutable, and strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Phase(Part):
    """A stretch of time with a rate.

    Attributes:
        seconds: How long.
        rate: Requests per second, on average.
        load: Instead of a rate: a share of the server's capacity at full depth, the ρ of queueing; 1 is all it can do.
        to: If given, the rate (or load) moves linearly to this by the phase's end: a ramp.
    """

    seconds: Seconds
    rate: Rate | None = None
    load: Rate | None = None
    to: Rate | None = None

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if (self.rate is None) == (self.load is None):
            raise ValueError("needs one of rate and load")
        return self

    def rates(self, capacity: float | None) -> tuple[float, float]:
        """Give the rates at its start and its end, requests per second.

        Raises:
            LoadTestError: If it is written as a load and the capacity is not known.
        """
        if self.rate is not None:
            return self.rate, self.rate if self.to is None else self.to
        if self.load is None or capacity is None:
            raise LoadTestError("capacity: needed for phases with a load: requests/s at full depth")
        return self.load * capacity, (self.load if self.to is None else self.to) * capacity


class Arrivals(Part):
    """How requests are spaced around the rate.

    Attributes:
        kind: `poisson`; `gamma`, bursts with gaps of a chosen spread; `fixed`, evenly; `trace`, as a file says.
        cv2: Of `gamma`: squared coefficient of variation of the gaps; 1 is Poisson, more is burstier.
        file: Of `trace`: a number per line, in seconds.
        holds: Of `trace`: whether these are times of arrivals or gaps between them.
        speed: Of `trace`: 2 replays it twice as fast.
    """

    kind: ArrivalKind = "poisson"
    cv2: Annotated[float, Field(gt=0, le=1000)] = 4.0
    file: Path | None = None
    holds: Literal["times", "gaps"] = "times"
    speed: Annotated[float, Field(gt=0, le=1e6)] = 1.0

    @model_validator(mode="after")
    def _file_of_a_trace(self) -> Self:
        if (self.kind == "trace") != (self.file is not None):
            raise ValueError("file: belongs to the kind trace, and the kind trace needs it")
        return self


class Difficulty(Part):
    """How the inputs' difficulty drifts while the test runs.

    Attributes:
        drift: `none` draws from all inputs alike; `linear` goes once from `low` to `high`; `sine` starts in the middle
            and swings between them.
        low: Place among the inputs, from 0 (the easiest) to 1 (the hardest).
        high: The same.
        period_s: Of `sine`.
        spread: Width of the part of the inputs that one moment draws from; 1 is all of them.
        scores: Where the inputs' difficulty comes from: an `.npy`, an `.npz` with an array `difficulty`, or a trace of
            `offramp calibrate` or `offramp evaluate`, whose first exit's doubt counts. Unset: the data's own array
            `difficulty`.
    """

    drift: Literal["none", "linear", "sine"] = "none"
    low: Share = 0.0
    high: Share = 1.0
    period_s: Seconds = 20.0
    spread: Annotated[float, Field(gt=0, le=1)] = 0.3
    scores: Path | None = None


class Disturbance(Part):
    """Clients that misbehave, mixed in.

    Attributes:
        disconnect_share: Share of requests whose client leaves before it has its answer.
        disconnect_within_ms: It leaves at a random time up to this long after it has sent.
        bad_share: Share of requests that no server should accept.
    """

    disconnect_share: Share = 0.0
    disconnect_within_ms: Annotated[float, Field(gt=0, le=60_000)] = 50.0
    bad_share: Share = 0.0

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.disconnect_share + self.bad_share > 1:
            raise ValueError("disconnect_share, bad_share: must be at most 1 together")
        return self


class Scenario(Part):
    """What a load test does.

    Attributes:
        name: Stands over the report.
        description: A sentence about it.
        seed: Of everything random: arrivals, order of inputs, who leaves.
        model: The model's name; None asks the server's default (`v1` only).
        api: `v1` is Offramp's classification, `v2` the Open Inference Protocol.
        body: `binary` (an image file, `.npy`, or a binary tensor) or `json`.
        fields: Routing fields of each request, such as `policy`, `threshold`, `latency_ms`.
        data: Labelled inputs.
        slo_ms: The time within which an answer counts as on time; None takes `latency_ms` from the fields, if given.
        timeout_s: Without an answer so long after it was due, a request has timed out.
        connections: Most requests in flight; what is due beyond that waits, and the wait counts.
        warm_up: Requests sent one after another before the run; not counted.
        max_requests: The run ends after so many arrivals.
        capacity: Requests per second that the server can do at full depth; what loads are shares of.
        arrivals: How requests are spaced.
        phases: Rates, one after another; none for a trace, which brings its own times.
        difficulty: How the inputs drift.
        disturbance: Clients that misbehave.
    """

    name: Annotated[str, Field(min_length=1, max_length=100)] = "loadtest"
    description: Annotated[str, Field(max_length=1000)] = ""
    seed: Annotated[int, Field(ge=0)] = 0
    model: str | None = None
    api: Api = "v1"
    body: Body = "binary"
    fields: dict[str, JsonValue] = Field(default_factory=dict)
    data: Path | None = None
    slo_ms: Annotated[float, Field(gt=0)] | None = None
    timeout_s: Seconds = 30.0
    connections: Annotated[int, Field(ge=1, le=10_000)] = 256
    warm_up: Annotated[int, Field(ge=0, le=10_000)] = 5
    max_requests: Annotated[int, Field(ge=1, le=MAX_ARRIVALS)] = MAX_ARRIVALS
    capacity: Rate | None = None
    arrivals: Arrivals = Arrivals()
    phases: Annotated[tuple[Phase, ...], Field(max_length=MAX_PHASES)] = ()
    difficulty: Difficulty = Difficulty()
    disturbance: Disturbance = Disturbance()

    @field_validator("fields")
    @classmethod
    def _a_budget_above_zero(cls, fields: dict[str, JsonValue]) -> dict[str, JsonValue]:
        budget = fields.get("latency_ms")
        if budget is None:
            return fields
        try:
            is_usable = float(str(budget)) > 0
        except ValueError:
            is_usable = False
        if not is_usable:
            raise ValueError(f"latency_ms: must be a number above 0; got {budget!r}")
        return fields

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if (self.arrivals.kind == "trace") == bool(self.phases):
            raise ValueError("phases: needed, unless arrivals are a trace, which has times of its own")
        if self.seconds > MAX_SECONDS:
            raise ValueError(f"phases: must last at most {MAX_SECONDS:g} s together")
        return self

    @property
    def seconds(self) -> float:
        """How long its phases last; 0 for a trace."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def needs_capacity(self) -> bool:
        """Whether a phase is written as a load while the capacity is not given."""
        return self.capacity is None and any(phase.load is not None for phase in self.phases)

    @property
    def deadline_ms(self) -> float | None:
        """The time within which an answer counts as on time."""
        if self.slo_ms is not None:
            return self.slo_ms
        return float(str(self.fields["latency_ms"])) if "latency_ms" in self.fields else None

    def changed(self, **changes: object) -> "Scenario":
        """Give this scenario with other values, checked like the first time.

        Raises:
            LoadTestError: If they make no sense.
        """
        return scenario_of({name: getattr(self, name) for name in self.model_fields_set} | changes)


def scenario_of(written: dict[str, Any]) -> Scenario:
    """Check what somebody wrote.

    Raises:
        LoadTestError: If it makes no sense; names the place and what is allowed.
    """
    try:
        return Scenario.model_validate(written)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        raise LoadTestError(f"{place}: {said}" if place else said) from None


def read_scenario(path: Path) -> Scenario:
    """Read a scenario from a TOML file; the files that it names are found beside it.

    Raises:
        LoadTestError: If there is no such file, or what it says makes no sense.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_SCENARIO_BYTES + 1)
        if len(text) > MAX_SCENARIO_BYTES:
            raise LoadTestError(f"scenario: {path.name!r} is over {MAX_SCENARIO_BYTES} bytes")
        written = tomllib.loads(text.decode())
    except OSError as error:
        raise LoadTestError(f"scenario: {str(path)!r}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LoadTestError(f"scenario: {path.name!r} is not TOML: {error}") from None
    try:
        scenario = scenario_of({"name": path.stem} | written)
    except LoadTestError as error:
        raise LoadTestError(f"scenario {path.name!r}: {error}") from None
    return _beside(scenario, path.parent)


def _beside(scenario: Scenario, folder: Path) -> Scenario:
    """Take files named in a scenario relative to it."""

    def place(file: Path | None) -> Path | None:
        return None if file is None else folder / file

    arrivals, difficulty = scenario.arrivals, scenario.difficulty
    return scenario.model_copy(
        update={
            "data": place(scenario.data),
            "arrivals": arrivals.model_copy(update={"file": place(arrivals.file)}),
            "difficulty": difficulty.model_copy(update={"scores": place(difficulty.scores)}),
        }
    )
