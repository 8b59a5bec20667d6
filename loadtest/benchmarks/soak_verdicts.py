"""What must hold after a soak, decided from both sides' counts and the server's memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

MIB: Final = 2**20
MOST_GROWTH: Final = 0.03
LEAST_GROWTH_BYTES: Final = 8 * MIB
"""Less than this is a page here and there, however small the server is."""


@dataclass(frozen=True, slots=True)
class Counted:
    """Requests by outcome, on both sides.

    Attributes:
        client: What the client saw.
        server: What the server's metrics say, warm-up requests included.
        server_rows: Rows that the server says an exit has answered.
        warm_up: Requests that the client sent and did not count; all were answered.
        inflight: Rows that the server still held in the end.
    """

    client: Mapping[str, int]
    server: Mapping[str, int]
    server_rows: int
    warm_up: int
    inflight: int


@dataclass(frozen=True, slots=True)
class Memory:
    """The server's resident memory.

    Attributes:
        samples: Seconds and bytes.
    """

    samples: tuple[tuple[float, float], ...]

    @property
    def quarters(self) -> tuple[float, float]:
        """Median bytes over the second quarter of the time, which caches have filled by then, and over the last."""
        time_s, held = np.array(self.samples).T
        quarter = time_s / time_s[-1] * 4
        second, last = held[(quarter >= 1) & (quarter < 2)], held[quarter >= 3]
        return float(np.median(second)), float(np.median(last))

    @property
    def slope_per_hour(self) -> float:
        """Bytes an hour, by least squares, after the first quarter."""
        time_s, held = np.array(self.samples[len(self.samples) // 4 :]).T
        return float(np.polyfit(time_s, held, 1)[0] * 3600)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One thing that must hold.

    Attributes:
        claim: What.
        found: What was found.
        is_good: Whether it holds.
    """

    claim: str
    found: str
    is_good: bool


def verdicts_of(counted: Counted, memory: Memory) -> list[Verdict]:
    """Judge a soak."""
    return [
        _every_arrival_has_an_outcome(counted),
        _bad_requests_are_refused(counted),
        *(_both_sides_agree(counted, outcome) for outcome in ("ok", "rejected", "deadline")),
        _no_request_failed(counted),
        _rows_are_answered_once(counted),
        _nothing_is_left(counted),
        _memory_is_flat(memory),
    ]


def _every_arrival_has_an_outcome(counted: Counted) -> Verdict:
    lost = counted.client.get("timeout", 0) + counted.client.get("error", 0)
    total = sum(counted.client.values())
    return Verdict("every client that waited has one answer", f"{lost} of {total:,} without", not lost and total > 0)


def _bad_requests_are_refused(counted: Counted) -> Verdict:
    refused, seen = counted.client.get("invalid", 0), counted.server.get("invalid", 0)
    return Verdict("bad requests are refused, and counted", f"client {refused:,}, server {seen:,}", refused == seen)


def _both_sides_agree(counted: Counted, outcome: str) -> Verdict:
    """Clients that left do not know what became of their requests; all others do."""
    ours = counted.client.get(outcome, 0) + (counted.warm_up if outcome == "ok" else 0)
    theirs, left = counted.server.get(outcome, 0), counted.client.get("left", 0)
    found = f"client {ours:,}, server {theirs:,}; {left:,} left"
    return Verdict(f"both sides count the same `{outcome}`, but for who left", found, ours <= theirs <= ours + left)


def _no_request_failed(counted: Counted) -> Verdict:
    failed, cancelled = counted.server.get("error", 0), counted.server.get("cancelled", 0)
    left = counted.client.get("left", 0)
    found = f"{failed} failed, {cancelled:,} cancelled of {left:,} left"
    return Verdict("no request failed; only those who left were cancelled", found, not failed and cancelled <= left)


def _rows_are_answered_once(counted: Counted) -> Verdict:
    """A row of a client that left may have reached an exit before anybody noticed."""
    ok, left = counted.server.get("ok", 0), counted.client.get("left", 0)
    found = f"{counted.server_rows:,} rows, {ok:,} requests of one row"
    return Verdict("each answered request is one answered row", found, ok <= counted.server_rows <= ok + left)


def _nothing_is_left(counted: Counted) -> Verdict:
    return Verdict("nothing is in flight in the end", f"{counted.inflight} rows", not counted.inflight)


def _memory_is_flat(memory: Memory) -> Verdict:
    second, last = memory.quarters
    slope = memory.slope_per_hour / MIB
    found = f"{second / MIB:.1f} MiB in the second quarter, {last / MIB:.1f} in the last; {slope:+.1f} MiB/h"
    is_flat = last - second <= max(MOST_GROWTH * second, LEAST_GROWTH_BYTES)
    return Verdict(f"memory grows by at most {MOST_GROWTH:.0%} (or {LEAST_GROWTH_BYTES // MIB} MiB)", found, is_flat)
