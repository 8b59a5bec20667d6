"""What held-out data says about a bundle: temperatures, operating points, certificates.

A calibration names the model digest it was made for and is refused beside any other model. A bundle without one has
temperatures of 1 and no operating points.
"""

import hashlib
import json
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from offramp_contract.errors import DigestMismatch, InvalidValue, ManifestError, UnsupportedFormat
from offramp_contract.files import BundleFiles
from offramp_contract.manifest import Manifest
from offramp_contract.parts import Sha256
from offramp_contract.policy_spec import MAX_EXITS, PolicySpec, compile_policy

CALIBRATION_FORMAT_VERSION: Final = 1
CALIBRATION_FILE = "calibration.json"
MAX_CALIBRATION_BYTES = 64 * 2**20
MAX_OPERATING_POINTS = 4096

CertificateKind: TypeAlias = Literal["consistency", "accuracy_loss", "accuracy"]
PointName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Certificate(_Part):
    """A statement about answers to come that held-out data supports.

    A `consistency` certificate says: the share of answers that differ from full depth's is at most `bound`. An
    `accuracy_loss` certificate: the share of answers that are wrong where full depth's is right is at most `bound`. An
    `accuracy` certificate: the share of right answers is at least `bound`.

    Attributes:
        method: `ltt`, Learn then Test with the exact binomial tail along a fixed sequence
            (https://arxiv.org/abs/2110.01052): the statement holds with probability 1 - delta over the data it was
            learnt from. `crc`, conformal risk control (https://arxiv.org/abs/2208.02814): it holds on average.
        delta: Of `ltt`; None for `crc`.
        num_samples: Size n of the data it rests on.
        data_digest: Sha256 of all the data that the calibration was made from.
    """

    kind: CertificateKind
    method: Literal["ltt", "crc"]
    bound: Share
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    num_samples: int = Field(ge=1)
    data_digest: Sha256

    @model_validator(mode="after")
    def _delta_is_that_of_ltt(self) -> Self:
        if (self.delta is None) != (self.method == "crc"):
            raise ValueError("delta belongs to the method ltt, and ltt needs one")
        return self


class OperatingPoint(_Part):
    """One calibrated setting of a policy with what to expect of it.

    Attributes:
        compute: Expected average share of the full path's FLOPs.
        accuracy: Expected accuracy.
        exit_rates: Expected share of rows that leave at each exit; they add up to 1.
        gate_threshold: What opens the gates, where the network has some (survey eq. 8); None: its own thresholds.
    """

    name: PointName
    policy: PolicySpec
    compute: float = Field(gt=0.0, le=1.0)
    accuracy: Share
    exit_rates: tuple[Share, ...] = Field(min_length=1, max_length=MAX_EXITS)
    gate_threshold: Share | None = None
    certificates: tuple[Certificate, ...] = Field(default=(), max_length=64)

    def certificate(self, kind: CertificateKind, delta: float | None = None) -> Certificate | None:
        """Give its strongest certificate of a kind.

        Args:
            kind: What it is about.
            delta: `ltt` certificates of at most this delta count; None: `crc` certificates do.
        """
        method = "crc" if delta is None else "ltt"
        held = [c for c in self.certificates if c.kind == kind and c.method == method]
        if delta is not None:
            held = [c for c in held if c.delta is not None and c.delta <= delta]
        strongest = max if kind == "accuracy" else min
        return strongest(held, key=lambda c: c.bound, default=None)


class Calibration(_Part):
    """All that calibration adds to a bundle.

    Attributes:
        model_digest: The model that temperatures, points and certificates were made for, and hold for.
        temperatures: One a exit; logits are divided by it before the softmax.
        data_digest: Sha256 of the data it was made from; None if it was made from none.
        num_samples: Size of that data.
    """

    format_version: Literal[1] = CALIBRATION_FORMAT_VERSION
    model_digest: Sha256
    temperatures: tuple[Annotated[float, Field(gt=0.0, allow_inf_nan=False)], ...]
    operating_points: tuple[OperatingPoint, ...] = Field(default=(), max_length=MAX_OPERATING_POINTS)
    data_digest: Sha256 | None = None
    num_samples: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [point.name for point in self.operating_points]
        if len(set(names)) != len(names):
            raise ValueError("two operating points have the same name")
        return self

    def __hash__(self) -> int:
        # Of a few fields: hashing hundreds of points would cost more than the look-ups that use it.
        return hash((self.model_digest, self.data_digest, self.temperatures, len(self.operating_points)))

    @classmethod
    def bare(cls, manifest: Manifest) -> Self:
        """Give the calibration of a bundle that has none."""
        return cls(model_digest=manifest.model_digest, temperatures=(1.0,) * len(manifest.exits))

    def to_bytes(self) -> bytes:
        """Give the canonical JSON text; its sha256 is the calibration digest."""
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True).encode()

    @property
    def calibration_digest(self) -> str:
        """Sha256 over the calibration, which names the model digest it was made for."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def read_calibration(files: BundleFiles, manifest: Manifest) -> Calibration:
    """Read a bundle's calibration, or give the bare one where there is none.

    Raises:
        UnsupportedFormat: If it was written in a format this version does not know.
        ManifestError: If it is not valid.
        DigestMismatch: If it was made for another model.
    """
    if not files.has(CALIBRATION_FILE):
        return Calibration.bare(manifest)
    written = _read_json(files.read(CALIBRATION_FILE, MAX_CALIBRATION_BYTES))
    if written.get("format_version") != CALIBRATION_FORMAT_VERSION:
        raise UnsupportedFormat(f"calibration format {written.get('format_version')!r} is not known here")
    try:
        calibration = Calibration.model_validate(written)
        for point in calibration.operating_points:
            compile_policy(point.policy, len(manifest.exits), manifest.native)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ", ".join(filter(None, (CALIBRATION_FILE, ".".join(map(str, problem["loc"])))))
        raise ManifestError(f"{where}: {problem['msg'].removeprefix('Value error, ')}") from None
    except InvalidValue as error:
        raise ManifestError(f"{CALIBRATION_FILE}: {error.message}") from None
    if calibration.model_digest != manifest.model_digest:
        raise DigestMismatch(f"{CALIBRATION_FILE} was made for another model than this bundle's")
    num_exits = len(manifest.exits)
    if len(calibration.temperatures) != num_exits:
        raise ManifestError(f"{CALIBRATION_FILE}: {num_exits} exits need as many temperatures")
    if any(len(point.exit_rates) != num_exits for point in calibration.operating_points):
        raise ManifestError(f"{CALIBRATION_FILE}: {num_exits} exits need as many exit rates in every operating point")
    if not manifest.gates and any(point.gate_threshold is not None for point in calibration.operating_points):
        raise ManifestError(f"{CALIBRATION_FILE}: an operating point has a gate threshold, but the model has no gates")
    return calibration


def _read_json(text: bytes) -> dict[str, Any]:
    try:
        written = json.loads(text)
    except (ValueError, RecursionError):
        raise ManifestError(f"{CALIBRATION_FILE} is not JSON") from None
    if not isinstance(written, dict):
        raise ManifestError(f"{CALIBRATION_FILE} is not a JSON object")
    return written
