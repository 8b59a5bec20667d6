"""The shapes of what the server says about its models, for the OpenAPI document only."""

from typing import Any

from offramp_contract.manifest import NativeRule, Predicate, Tensor
from offramp_contract.policy_spec import PolicySpec
from pydantic import Field

from offramp_server.api.schemas import CertificateStatement, Document, Share


class ModelSummary(Document):
    """A served model."""

    name: str
    version: str
    task: str
    num_stages: int
    num_exits: int
    num_classes: int


class ModelList(Document):
    """The served models."""

    models: list[ModelSummary]


class StageDescription(Document):
    """A stage and its costs."""

    name: str
    exit: int | None = Field(description="Index of the exit it ends in, if any.")
    gates: list[str] = Field(description="The gates that must all be open for it to run, the outermost first.")
    flops: int = Field(description="Of one row; a multiply-add counts two.")
    carry_bytes: int
    measured_ms: dict[str, float] = Field(description="Expected milliseconds by batch size, on this machine.")


class ExitDescription(Document):
    """An exit, and the share of the full path's FLOPs a row has run when it stands there."""

    index: int
    name: str
    stage: str
    depth: Share
    num_classes: int = Field(description="Exits may differ in it; then their labels are not compared.")
    native: NativeRule | None = Field(None, description="The network's own rule for leaving here, if it has one.")


class GateDescription(Document):
    """A decision, for each row, whether it runs the stages behind the gate."""

    name: str
    stage: str | None = Field(description="The stage that scores it; null where the score depends on no input.")
    priority: Share | None = Field(description="The score that depends on no input: depth is the caller's choice.")
    threshold: Share = Field(description="The gate is open where the score is at least this, unless a request differs.")
    stages: list[str] = Field(description="The stages behind it.")


class GearDescription(Document):
    """One step of the ladder by which a backlog moves requests that leave the choice to the server."""

    gear: int = Field(description="0 is what they get without a backlog.")
    policy: PolicySpec
    operating_point: str | None = Field(description="Null where gear 0 is a policy that was not calibrated.")
    gate_threshold: Share | None
    compute: Share | None = Field(description="Average share of the full path's FLOPs.")
    accuracy: Share | None
    expected_ms: float = Field(
        description="Average device time of a row among many: as calibration expects it, then as rows lately took it."
    )
    certificates: list[CertificateStatement] = Field(description="Those by which it is above the operator's floor.")


class ModelDescription(ModelSummary):
    """All that may be asked of a model."""

    precision: str
    inputs: list[Tensor]
    preprocessing: dict[str, Any] | None
    labels: list[str] | None
    stages: list[StageDescription]
    exits: list[ExitDescription]
    gates: list[GateDescription]
    predicates: list[Predicate] = Field(description="What the network's own code asks on the way to each exit.")
    default_policy: PolicySpec = Field(description="Serves requests that choose neither policy nor budget.")
    default_operating_point: str | None = Field(description="The calibrated point it is, if it is one.")
    policies: list[str]
    combine: list[str]
    on_miss: list[str]
    num_operating_points: int
    gear: int | None = Field(description="The gear now; null if the model has none.")
    gears: list[GearDescription] = Field(description="From what requests get now to the cheapest above the floor.")
    provenance: dict[str, Any]


class OperatingPointDescription(Document):
    """One calibrated setting of a policy, with what held-out data says to expect of it."""

    name: str
    policy: PolicySpec
    gate_threshold: Share | None = Field(description="What opens the gates, where a model has some; null: their own.")
    compute: Share = Field(description="Average share of the full path's FLOPs.")
    accuracy: Share
    exit_rates: list[Share] = Field(description="Share of rows that leave at each exit.")
    expected_ms: float = Field(description="Average time in the stages for a row alone, as this machine measures it.")
    certificates: list[CertificateStatement]


class OperatingPointList(Document):
    """A model's calibrated operating points, cheapest first."""

    model: str
    version: str
    data_digest: str | None = Field(description="Sha256 of the data they were calibrated on.")
    num_samples: int
    temperatures: list[float]
    operating_points: list[OperatingPointDescription]
