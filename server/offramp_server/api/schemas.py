"""The shapes of requests and answers, for the OpenAPI document only: no request is checked by these."""

from typing import Annotated, Any, Literal

from offramp_contract.policy_spec import PolicySpec
from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
PolicyName = Literal["confidence", "entropy", "margin", "agreement", "patience", "native"]


class Document(BaseModel):
    """An object that has no fields but those listed."""

    model_config = ConfigDict(extra="forbid")


OpenShare = Annotated[float, Field(gt=0.0, lt=1.0)]


class Risk(Document):
    """A share of answers is at most epsilon, with probability 1 - delta; without delta, on average."""

    epsilon: OpenShare
    delta: OpenShare | None = None
    kind: Literal["consistency", "accuracy_loss"] = Field(
        "consistency",
        description="Which answers: those that differ from full depth's, or those that are wrong where it is right.",
    )


class RoutingFields(Document):
    """How the rows of a request are routed. All optional; the model's default policy holds where none is given."""

    policy: PolicyName | PolicySpec | None = Field(None, description="A kind's name, or an object with its parameters.")
    threshold: float | list[float | None] | None = Field(
        None,
        description="Beside a kind's name: one number, or one per non-final exit. Shares from 0 to 1, but for the kind "
        "`native`: there in the network's own units, and null keeps its own.",
    )
    patience: int | None = Field(None, ge=1, description="Beside the kind `patience`.")
    latency_ms: float | None = Field(
        None,
        gt=0,
        description="Hard budget from the request's arrival to its answer; at a boundary that would break it the row "
        "leaves with the answer it has, reason `deadline`.",
    )
    operating_point: str | None = Field(None, description="Name of a calibrated point of the model.")
    compute: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Soft budget: the average share of full compute; picks the most accurate calibrated point within "
        "it, of one kind of policy if `policy` names one. Beside accuracy or risk: refused if their point costs more.",
    )
    accuracy: Share | None = Field(None, description="Least accuracy; picks the cheapest point certified for it.")
    risk: Risk | None = Field(None, description="Bound on what depth may change; picks the cheapest certified point.")
    min_exit: int | None = Field(None, ge=0, description="No voluntary exit before this one.")
    max_exit: int | None = Field(None, ge=0, description="No stage beyond this exit.")
    gate_threshold: Share | list[Share] | None = Field(
        None,
        description="For networks with gates: a row runs the stages behind a gate if its score is at least this. One "
        "number, or one per gate; unset, each gate's own.",
    )
    gates: Literal["own", "open", "shut"] | int | None = Field(
        None,
        description="For networks with gates: `own` leaves the decision to the scores (default), `open` and `shut` "
        "force all. A count keeps so many gates open, those of highest priority, where depth is the caller's choice. "
        "Give this or gate_threshold.",
    )
    combine: Literal["last", "mean", "geometric"] | None = Field(
        None, description="How the answer combines the exits seen; default last."
    )
    on_miss: Literal["answer", "reject"] | None = Field(
        None, description="When not even the first exit can answer in time: answer late (default) or reject with 504."
    )
    top_k: int | None = Field(None, ge=1, le=5, description="How many leading classes the answer lists; default 5.")
    explain: bool | None = Field(
        None, description="Add the answer of every exit seen on the way, and what every gate decided."
    )


class ClassifyRequest(RoutingFields):
    """A classify request as JSON: exactly one of `inputs`, `image` and `text`."""

    inputs: list[Any] | dict[str, list[Any]] | None = Field(
        None, description="One row or a batch as nested lists; an object of them by name for several inputs."
    )
    image: str | list[str] | None = Field(None, description="Base64 of an encoded image, or a list of them.")
    text: str | list[str] | None = Field(None, description="A text, or a list of them.")


class ClassProbability(Document):
    """One class and its probability."""

    label: str
    class_id: int
    probability: Share


class ExitPlace(Document):
    """Which exit."""

    index: int
    name: str
    of: int = Field(description="Number of exits of the model.")


class ExitTaken(ExitPlace):
    """The exit a row left at, and why."""

    reason: Literal[
        "confident",
        "entropy",
        "margin",
        "patience",
        "learned",
        "agreement",
        "window",
        "depth_cap",
        "deadline",
        "final",
        "native",
    ]
    forced: bool = Field(
        description="Whether the deadline, not the policy or a cap, made the row leave, or shut a gate on its way."
    )


class GateDecided(Document):
    """What one gate decided over a row."""

    name: str
    score: float | None = Field(description="Its score, or its priority; null if its stage did not run.")
    threshold: float | None = Field(description="What the score is compared with; null where the request forces it.")
    decision: Literal["open", "shut", "forced"] | None = Field(
        description="`forced`: shut because of the deadline; null: the row did not come to it."
    )


class GatesDecided(Document):
    """What the gates decided over a row."""

    open: int = Field(description="How many gates the row went through.")
    forced: int = Field(description="How many more it would have gone through, had there been time.")
    of: int = Field(description="Number of gates of the model.")
    decisions: list[GateDecided] | None = Field(None, description="One by one, with `explain`.")


class ExitSeen(ClassProbability):
    """What one exit said on the way."""

    exit: ExitPlace
    top: list[ClassProbability]
    entropy: float
    margin: float


class Problem(BaseModel):
    """An RFC 9457 problem document."""

    type: str = Field(description="Stable name of the kind of error, a relative URI reference.")
    title: str
    status: int
    detail: str = Field(description="One sentence that names the field and what is allowed.")
    field: str | None = None
    retry_after_s: float | None = None


class Prediction(ClassProbability):
    """The answer of one row."""

    top: list[ClassProbability]
    exit: ExitTaken
    depth: Share = Field(description="Share of the full path's FLOPs that the row ran.")
    stages: list[str] = Field(description="The stages that ran for it, in order.")
    score: float = Field(description="The statistic that the policy looked at.")
    threshold: float | None = Field(description="What it was compared with, where that is one number.")
    gates: GatesDecided | None = Field(None, description="Of a model with gates.")
    exits: list[ExitSeen] | None = None


class FailedPrediction(Document):
    """The answer of one row that failed where others did not."""

    error: Problem


class CertificateStatement(Document):
    """What held-out data certifies of the operating point."""

    kind: Literal["consistency", "accuracy_loss", "accuracy"]
    method: Literal["ltt", "crc"]
    bound: Share
    delta: OpenShare | None = Field(description="With which probability it may be wrong; null: it holds on average.")
    num_samples: int


class PolicyUsed(Document):
    """The policy in force."""

    kind: str
    operating_point: str | None
    certified: CertificateStatement | None
    gear: int | None = Field(
        description="Where the choice was left to the server: how far down the model's gears its load has moved it; 0 "
        "is not at all. Null where the request chose for itself or the model has no gears."
    )


class Timing(Document):
    """Where the time went, in milliseconds."""

    queue_ms: float
    compute_ms: float
    total_ms: float
    budget_ms: float | None


class ClassifyAnswer(Document):
    """The answer: one prediction per input, in order."""

    model: str
    version: str
    predictions: list[Prediction | FailedPrediction]
    policy: PolicyUsed
    timing: Timing
