"""All that a data set says about a bundle, as one record of numbers: the report and its JSON are written from it."""

from dataclasses import dataclass, field
from typing import Final, Literal

from pydantic import TypeAdapter

from offramp_calibration.advice import Advice
from offramp_calibration.cautions import Caution
from offramp_calibration.examples import Example
from offramp_calibration.exit_quality import ExitResult
from offramp_calibration.gate_results import GateResults
from offramp_calibration.measured import BudgetResult, CurveSummary, MeasuredPoint
from offramp_calibration.overthinking import Overthinking
from offramp_calibration.promises import CertificateCount, PromiseResult

EVALUATION_FORMAT_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the numbers come from; without a date, so that the same input gives the same record.

    Attributes:
        calibration_digest: None if the bundle is not calibrated.
        calibration_data_digest: Of the data that it was calibrated on; None if on none.
        command: As it was typed; empty if none was.
        machine: Its processor and cores: times are this machine's.
        versions: Of the software, by name.
    """

    model_digest: str
    calibration_digest: str | None
    calibration_data_digest: str | None
    calibration_num_samples: int
    data: str
    data_digest: str
    command: str = ""
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CostView:
    """What the policies come to in one kind of cost.

    Attributes:
        full: Cost of full depth.
        anytime_auc: Average accuracy over the budgets at which the network may be stopped.
        start: Budget from which on areas are compared.
        curves: The label oracle's if there is one, that of all policies together, one per family, and that of the
            static exits.
    """

    full: float
    anytime_auc: float
    start: float
    curves: tuple[CurveSummary, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Every number of a report.

    Attributes:
        cautions: What to know before believing them.
        exits: How good each exit is.
        static: Every sample leaving at the same exit, per exit, every gate open; the last is full depth.
        label_oracle: Everyone leaves at the first right exit, at the last if none is. None for a gated network: there
            an exit may be right because a gate was shut, so the best choice of exits alone bounds nothing.
        agreement_oracle: Everyone leaves at the first exit that says what the last says; None likewise.
        points: Every operating point; of a bundle without any, a sweep of confidence thresholds.
        chosen: Names of the points that some compute budget chooses, the cheapest first.
        budgets: What asking for an average compute comes to.
        compute: Curves over the share of full FLOPs.
        milliseconds: Curves over the time of one answer at batch 1, if the exits' times are known.
        reference: The setting that `ExitResult.reaching` and the examples are about.
        promises: Certified budgets beside what this data shows.
        certificates: How many certificates held.
        advice: Which exits cost more than they save under `reference`, if that was measured.
        gates: What each gate threshold comes to, of a gated network.
    """

    model: str
    num_samples: int
    num_classes: int
    cautions: tuple[Caution, ...]
    exits: tuple[ExitResult, ...]
    static: tuple[MeasuredPoint, ...]
    label_oracle: MeasuredPoint | None
    agreement_oracle: MeasuredPoint | None
    points: tuple[MeasuredPoint, ...]
    chosen: tuple[str, ...]
    budgets: tuple[BudgetResult, ...]
    compute: CostView
    milliseconds: CostView | None
    overthinking: Overthinking
    reference: MeasuredPoint
    promises: tuple[PromiseResult, ...]
    certificates: tuple[CertificateCount, ...]
    examples: tuple[Example, ...]
    provenance: Provenance
    advice: Advice | None = None
    gates: GateResults | None = None
    format_version: Literal[1] = EVALUATION_FORMAT_VERSION

    @property
    def full(self) -> MeasuredPoint:
        """Full depth."""
        return self.static[-1]

    @property
    def is_calibrated(self) -> bool:
        """Whether its points are the bundle's own."""
        return bool(self.budgets)

    @property
    def saw_this_data(self) -> bool:
        """Whether the bundle was calibrated on this very data."""
        return self.provenance.calibration_data_digest == self.provenance.data_digest

    def to_json(self) -> bytes:
        """Write it."""
        return _ADAPTER.dump_json(self, indent=1)

    @classmethod
    def from_json(cls, text: bytes) -> "Evaluation":
        """Read what `to_json` wrote."""
        return _ADAPTER.validate_json(text)


_ADAPTER: TypeAdapter[Evaluation] = TypeAdapter(Evaluation)
