"""What held-out data says about a bundle: temperatures, operating points, certificates.

A calibration names the model digest it was made for and is refused beside any other model. A bundle without one has
temperatures of 1 and no operating points.
"""

import hashlib
import json
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from offramp_contract.errors import DigestMismatch, InvalidValue, ManifestError, UnsupportedFormat
from offramp_contract.files import BundleFiles
from offramp_contract.manifest import Manifest, Sha256
from offramp_contract.policy_spec import PolicySpec, compile_policy

CALIBRATION_FORMAT_VERSION: Final = 1
CALIBRATION_FILE = "calibration.json"
MAX_CALIBRATION_BYTES = 64 * 2**20

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Certificate(_Part):
    """A statement that held-out data supports with probability 1 - delta.

    Attributes:
        kind: `consistency` bounds the share of answers that differ from full depth; `accuracy` bounds the accuracy.
        method: `ltt` (exact binomial tail, fixed sequence) or `crc` (controls the mean).
        bound: The epsilon of `consistency`, or the least accuracy of `accuracy`.
        num_samples: Size of the data it rests on.
        data_digest: Sha256 of that data.
    """

    kind: Literal["consistency", "accuracy"]
    method: Literal["ltt", "crc"]
    bound: Share
    delta: Share
    num_samples: int = Field(ge=1)
    data_digest: Sha256


class OperatingPoint(_Part):
    """One calibrated setting of a policy with what to expect of it.

    Attributes:
        compute: Expected average share of the full path's FLOPs.
        accuracy: Expected accuracy.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    policy: PolicySpec
    compute: float = Field(gt=0.0, le=1.0)
    accuracy: Share
    certificates: tuple[Certificate, ...] = ()


class Calibration(_Part):
    """All that calibration adds to a bundle."""

    format_version: Literal[1] = CALIBRATION_FORMAT_VERSION
    model_digest: Sha256
    temperatures: tuple[Annotated[float, Field(gt=0.0, allow_inf_nan=False)], ...]
    operating_points: tuple[OperatingPoint, ...] = Field(default=(), max_length=4096)

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

    def within_compute(self, compute: float) -> OperatingPoint:
        """Choose the most accurate operating point whose expected compute is within a budget, the cheapest of equals.

        Raises:
            InvalidValue: If no operating point is cheap enough, naming the cheapest.
        """
        within = [point for point in self.operating_points if point.compute <= compute]
        if not within:
            raise InvalidValue(
                self._unreachable("compute", min((p.compute for p in self.operating_points), default=None)),
                field="compute",
            )
        return max(within, key=lambda point: (point.accuracy, -point.compute))

    def certified_accuracy(self, accuracy: float) -> OperatingPoint:
        """Choose the cheapest operating point certified to reach an accuracy.

        Raises:
            InvalidValue: If none is certified for it, naming the best that is.
        """
        best = {
            p: max((c.bound for c in p.certificates if c.kind == "accuracy"), default=None)
            for p in self.operating_points
        }
        reaching = [point for point, bound in best.items() if bound is not None and bound >= accuracy]
        if not reaching:
            known = [bound for bound in best.values() if bound is not None]
            raise InvalidValue(self._unreachable("accuracy", max(known, default=None)), field="accuracy")
        return min(reaching, key=lambda point: point.compute)

    def certified_risk(self, epsilon: float, delta: float) -> OperatingPoint:
        """Choose the cheapest operating point certified to differ from full depth in at most a share of answers.

        Raises:
            InvalidValue: If none is certified for it.
        """
        holding = [
            point
            for point in self.operating_points
            if any(c.kind == "consistency" and c.bound <= epsilon and c.delta <= delta for c in point.certificates)
        ]
        if not holding:
            bounds = [
                c.bound
                for p in self.operating_points
                for c in p.certificates
                if c.kind == "consistency" and c.delta <= delta
            ]
            raise InvalidValue(self._unreachable("risk", min(bounds, default=None)), field="risk")
        return min(holding, key=lambda point: point.compute)

    def _unreachable(self, budget: str, best: float | None) -> str:
        if best is None:
            return (
                f"{budget}: this model has no operating point calibrated for it; ask with policy and threshold instead"
            )
        return f"{budget}: no operating point of this model reaches it; the best reachable is {best:g}"


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
            compile_policy(point.policy, len(manifest.exits))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ", ".join(filter(None, (CALIBRATION_FILE, ".".join(map(str, problem["loc"])))))
        raise ManifestError(f"{where}: {problem['msg'].removeprefix('Value error, ')}") from None
    except InvalidValue as error:
        raise ManifestError(f"{CALIBRATION_FILE}: {error.message}") from None
    if calibration.model_digest != manifest.model_digest:
        raise DigestMismatch(f"{CALIBRATION_FILE} was made for another model than this bundle's")
    if len(calibration.temperatures) != len(manifest.exits):
        raise ManifestError(f"{CALIBRATION_FILE}: {len(manifest.exits)} exits need as many temperatures")
    return calibration


def _read_json(text: bytes) -> dict[str, Any]:
    try:
        written = json.loads(text)
    except (ValueError, RecursionError):
        raise ManifestError(f"{CALIBRATION_FILE} is not JSON") from None
    if not isinstance(written, dict):
        raise ManifestError(f"{CALIBRATION_FILE} is not a JSON object")
    return written
