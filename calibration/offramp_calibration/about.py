"""Where a trace comes from, and in which format its file is written.

Format 2 adds, for networks that leave by rules of their own, those rules and what they compare; format 3, for gated
networks, the passes at other gate thresholds. A trace without either is still written in format 1.

Shapes: E = exits, K = exits with a rule of the network's own, P = passes.
"""

import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Final, Self, TypeAlias

from offramp_contract.errors import BrokenTrace
from offramp_contract.native import NativeRule

PLAIN_FORMAT: Final = 1
NATIVE_FORMAT: Final = 2
GATED_FORMAT: Final = 3
_SHA256 = re.compile(r"[0-9a-f]{64}")

GateThreshold: TypeAlias = float | None
"""What opens the gates: a cut-off of all their scores in [0, 1], or None for the network's own thresholds."""
ALL_OPEN: Final = 0.0
"""The gate threshold that every score reaches: full depth."""


@dataclass(frozen=True, slots=True)
class About:
    """Where a trace comes from.

    Attributes:
        model: Name of the bundle.
        model_digest: Its model digest.
        data_digest: Sha256 over all inputs and labels, in order (see `record`).
        depth_E: Share of the full path's FLOPs that a row has run when it stands at each exit, rising to 1.
        native_K: The network's own exit rules.
        threshold_P: Of a gated network, what opened its gates in each pass; in the first `ALL_OPEN`.
        num_gates: Number of its gates.
    """

    model: str
    model_digest: str
    data_digest: str
    depth_E: tuple[float, ...]
    native_K: tuple[NativeRule, ...] = ()
    threshold_P: tuple[GateThreshold, ...] = ()
    num_gates: int = 0

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Read it.

        Raises:
            BrokenTrace: If it is not what `record` writes, or of a format this version does not know.
        """
        try:
            about = cls._of_fields(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            raise BrokenTrace("the trace does not say which bundle and data it comes from") from None
        texts = (about.model, about.model_digest, about.data_digest)
        if not all(isinstance(text, str) for text in texts) or not all(map(_SHA256.fullmatch, texts[1:])):
            raise BrokenTrace("the trace does not say which bundle and data it comes from")
        rising = all(a <= b for a, b in zip((0.0, *about.depth_E), (*about.depth_E, 1.0), strict=True))
        if not about.depth_E or not rising:
            raise BrokenTrace("the trace's depths do not rise from 0 to 1")
        if len(about.native_K) not in (0, len(about.depth_E) - 1):
            raise BrokenTrace("the trace's exit rules are not one for every exit but the final one")
        return about

    @classmethod
    def _of_fields(cls, written: dict[str, Any]) -> Self:
        if (version := written.pop("format_version")) not in (PLAIN_FORMAT, NATIVE_FORMAT, GATED_FORMAT):
            raise BrokenTrace(f"trace format {version!r} is not known here; this Offramp reads 1, 2 and 3")
        depth_E = tuple(float(depth) for depth in written.pop("depth_E"))
        rules = written.pop("native_K") if version != PLAIN_FORMAT else ()
        native_K = tuple(map(NativeRule.model_validate, rules))
        if version != GATED_FORMAT:
            return cls(**written, depth_E=depth_E, native_K=native_K)
        threshold_P = tuple(None if one is None else float(one) for one in written.pop("threshold_P"))
        num_gates = int(written.pop("num_gates"))
        if threshold_P[:1] != (ALL_OPEN,) or len(set(threshold_P)) < len(threshold_P) or num_gates < 1:
            raise BrokenTrace("the trace's gate thresholds must begin with 0, which opens every gate, and all differ")
        return cls(**written, depth_E=depth_E, native_K=native_K, threshold_P=threshold_P, num_gates=num_gates)

    def to_json(self) -> bytes:
        """Write it."""
        version = GATED_FORMAT if self.threshold_P else NATIVE_FORMAT if self.native_K else PLAIN_FORMAT
        written = asdict(self) | {"format_version": version}
        written["native_K"] = [rule.model_dump(mode="json") for rule in self.native_K]
        newer = {PLAIN_FORMAT: ("native_K", "threshold_P", "num_gates"), NATIVE_FORMAT: ("threshold_P", "num_gates")}
        for name in newer.get(version, ()):
            del written[name]
        return json.dumps(written).encode()
