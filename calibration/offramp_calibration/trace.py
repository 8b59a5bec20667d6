"""A trace: what every exit of a bundle said about every sample of a data set, recorded in one pass at full depth.

A trace is all that calibration and evaluation need: any policy can be replayed over it without running the network
again. Its file is a plain `.npz` that numpy reads anywhere; ours are stored without compression, so that the arrays are
mapped into memory instead of being read, and neither writing nor reading one needs room for it.

A gate's decision changes what later stages see, so the trace of a gated network holds a pass for each gate threshold
that was tried: the first with every gate open, which is full depth, then those of `About.threshold_P`.

Shapes: N = samples, E = exits, C = classes, K = exits with a rule of the network's own: all but the final one, or none,
P = passes, G = gates.
"""

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from offramp_contract.errors import BrokenTrace
from offramp_contract.manifest import Manifest
from offramp_contract.statistics import FloatArray, IntArray

from offramp_calibration.about import ALL_OPEN, About, GateThreshold
from offramp_calibration.npz import BROKEN_ZIP, members_of, read_member

__all__ = ["ALL_OPEN", "About", "GatePass", "GateThreshold", "Trace", "named"]

MAX_ABOUT_BYTES = 2**20
MAX_SAMPLES = 2**31
_LOCAL_HEADER_BYTES = 30
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True, slots=True)
class GatePass:
    """What became of every sample of a gated network at one gate threshold; all arrays are mapped from the file.

    Attributes:
        threshold: What opened the gates.
        logits_ENC: As in `Trace`.
        native_KN: As in `Trace`.
        depth_NE: Share of the full path's FLOPs that each sample had run when it stood at each exit, float32.
        score_NG: The gates' scores, float32; NaN where none was computed.
    """

    threshold: GateThreshold
    logits_ENC: tuple[FloatArray, ...]
    native_KN: tuple[FloatArray, ...]
    depth_NE: FloatArray
    score_NG: FloatArray


@dataclass(frozen=True, slots=True)
class Trace:
    """What every exit said about every sample.

    Attributes:
        about: Where it comes from.
        label_N: The right class of each sample, int64.
        logits_ENC: Per exit the raw scores, float32, shape (N, C); mapped from the file where one was read.
        native_KN: What the network's own rule compares at each exit, float32, shape (N,), never NaN; mapped likewise.
        passes: Of a gated network, every pass; the first is the one with all gates open, `logits_ENC` and `native_KN`.
    """

    about: About
    label_N: IntArray
    logits_ENC: tuple[FloatArray, ...]
    native_KN: tuple[FloatArray, ...] = ()
    passes: tuple[GatePass, ...] = ()

    def __len__(self) -> int:
        return len(self.label_N)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Open a trace's file.

        Raises:
            BrokenTrace: If it is not a trace, or a part of it is missing or of the wrong shape.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                members = members_of(archive)
                if "about" not in members or members["about"].file_size > MAX_ABOUT_BYTES:
                    raise BrokenTrace(f"{path.name!r} is not a trace: it does not say which bundle it comes from")
                about = About.from_json(_map_member(path, archive, members["about"]).tobytes())
                label_N = _map_member(path, archive, members["label"])
                arrays = _Arrays(path, archive, members, about)
                logits_ENC, native_KN = arrays.exits(0)
                passes = tuple(arrays.gate_pass(index) for index in range(len(about.threshold_P)))
        except KeyError as missing:
            raise BrokenTrace(f"{path.name!r} holds no {missing.args[0]}") from None
        except BROKEN_ZIP:
            raise BrokenTrace(f"{path.name!r} is not a trace that `record` wrote") from None
        _check_labels(label_N, logits_ENC)
        _check_exits(label_N, logits_ENC, native_KN)
        for index, one in enumerate(passes):
            _check_pass(about, label_N, one, index)
        return cls(about, label_N, logits_ENC, native_KN, passes)

    def at(self, threshold: GateThreshold) -> Self:
        """Give the trace with the logits and scores of one of its passes in the place of those of full depth.

        Raises:
            BrokenTrace: If it holds no pass at that gate threshold.
        """
        one = self.pass_at(threshold)
        return replace(self, logits_ENC=one.logits_ENC, native_KN=one.native_KN)

    def pass_at(self, threshold: GateThreshold) -> GatePass:
        """Find a pass.

        Raises:
            BrokenTrace: If it holds none at that gate threshold.
        """
        for one in self.passes:
            if one.threshold == threshold:
                return one
        wanted = "with the network's own gate thresholds" if threshold is None else f"at gate threshold {threshold:g}"
        raise BrokenTrace(f"the trace holds no pass {wanted}; remove it to record it anew")

    def check_made_for(self, manifest: Manifest) -> None:
        """Check that it can have been recorded with a bundle.

        Raises:
            BrokenTrace: If it was made for another model, or holds what `record` would never have written for this one.
        """
        if self.about.model_digest != manifest.model_digest:
            raise BrokenTrace(
                f"the trace was recorded with another model than this bundle's, {self.about.model[:64]!r}"
            )
        widths = [exit_.num_classes for exit_ in manifest.exits]
        if [
            logits_NC.shape[1] for logits_NC in self.logits_ENC
        ] != widths or self.about.depth_E != manifest.exit_depths:
            raise BrokenTrace("the trace's exits are not this bundle's")
        if self.about.native_K and self.about.native_K != tuple(exit_.native for exit_ in manifest.exits[:-1]):
            raise BrokenTrace("the trace's exit rules are not this bundle's")
        gates = len(manifest.gates)
        if self.about.num_gates != gates:
            raise BrokenTrace(f"the trace was recorded with {self.about.num_gates} gates, and this bundle has {gates}")
        _check_finite(self.logits_ENC, 0, len(self))
        for index, one in enumerate(self.passes[1:], 1):
            _check_finite(one.logits_ENC, index, len(self))


def named(name: str, pass_index: int) -> str:
    """Name an array of a pass in the file: those of the first, or only, pass are named as they are."""
    return f"{name}_at_{pass_index}" if pass_index else name


@dataclass(frozen=True, slots=True)
class _Arrays:
    """Maps the arrays of a trace's passes."""

    path: Path
    archive: zipfile.ZipFile
    members: Mapping[str, zipfile.ZipInfo]
    about: About

    def exits(self, index: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """Give every exit's logits and what its own rule compares in a pass."""
        logits_ENC = tuple(self._map(named(f"logits_{k}", index)) for k in range(len(self.about.depth_E)))
        native_KN = tuple(self._map(named(f"native_{k}", index)) for k in range(len(self.about.native_K)))
        return logits_ENC, native_KN

    def gate_pass(self, index: int) -> GatePass:
        """Give a pass of a gated network."""
        depth_NE, score_NG = (self._map(named(name, index)) for name in ("depth", "scores"))
        return GatePass(self.about.threshold_P[index], *self.exits(index), depth_NE, score_NG)

    def _map(self, name: str) -> np.ndarray:
        return _map_member(self.path, self.archive, self.members[name])


def _map_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Map one array of an `.npz` into memory."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise BrokenTrace(f"{path.name!r} is compressed; a trace is written as `record` writes it, without compression")
    member = read_member(archive, info, BrokenTrace)
    with path.open("rb") as file:
        file.seek(info.header_offset)
        local = file.read(_LOCAL_HEADER_BYTES)
        name_length, extra_length = np.frombuffer(local[26:30], "<u2").tolist()
    offset = info.header_offset + _LOCAL_HEADER_BYTES + name_length + extra_length + member.header_bytes
    return np.memmap(path, member.dtype, "r", offset, member.shape)


def _check_labels(label_N: np.ndarray, logits_ENC: Sequence[np.ndarray]) -> None:
    if label_N.ndim != 1 or label_N.dtype != np.int64 or not 1 <= len(label_N) <= MAX_SAMPLES:
        raise BrokenTrace("the trace's labels must be int64, one a sample")
    num_classes = min((logits_NC.shape[1] for logits_NC in logits_ENC if logits_NC.ndim == 2), default=0)
    if num_classes and (num_classes < 2 or label_N.min() < 0 or label_N.max() >= num_classes):
        raise BrokenTrace(f"the trace's labels are not all among the {num_classes} classes that its exits tell apart")


def _check_exits(
    label_N: np.ndarray, logits_ENC: Iterable[np.ndarray], native_KN: Iterable[np.ndarray], pass_index: int = 0
) -> None:
    for index, logits_NC in enumerate(logits_ENC):
        if logits_NC.ndim != 2 or logits_NC.dtype != np.float32 or len(logits_NC) != len(label_N):
            name = named(f"logits_{index}", pass_index)
            raise BrokenTrace(f"the trace's {name} must be float32, one row a sample")
    for index, native_N in enumerate(native_KN):
        if native_N.shape != label_N.shape or native_N.dtype != np.float32 or np.isnan(native_N).any():
            name = named(f"native_{index}", pass_index)
            raise BrokenTrace(f"the trace's {name} must be float32, one number a sample")


def _check_pass(about: About, label_N: np.ndarray, one: GatePass, index: int) -> None:
    _check_exits(label_N, one.logits_ENC, one.native_KN, index)
    depth_NE, score_NG = one.depth_NE, one.score_NG
    if depth_NE.shape != (len(label_N), len(about.depth_E)) or depth_NE.dtype != np.float32:
        raise BrokenTrace(f"the trace's {named('depth', index)} must be float32, one number a sample and exit")
    if not ((depth_NE >= 0) & (depth_NE <= np.array(about.depth_E, dtype=np.float32))).all():
        raise BrokenTrace(f"the trace's {named('depth', index)} holds more than full depth, or no number")
    if score_NG.shape != (len(label_N), about.num_gates) or score_NG.dtype != np.float32:
        raise BrokenTrace(f"the trace's {named('scores', index)} must be float32, one number a sample and gate")


def _check_finite(logits_ENC: Iterable[FloatArray], pass_index: int, num_samples: int) -> None:
    for index, logits_NC in enumerate(logits_ENC):
        starts = range(0, num_samples, _ROWS_AT_ONCE)
        if not all(np.isfinite(logits_NC[start : start + _ROWS_AT_ONCE]).all() for start in starts):
            raise BrokenTrace(f"the trace's {named(f'logits_{index}', pass_index)} are not all finite")
