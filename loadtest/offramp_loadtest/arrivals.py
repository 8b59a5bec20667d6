"""When requests are due. Arrivals depend on nothing but the scenario: an open loop never waits for an answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from offramp_loadtest.errors import LoadTestError
from offramp_loadtest.scenario import MAX_ARRIVALS, MAX_SECONDS, Arrivals, Phase, Scenario

MAX_TRACE_BYTES: Final = 64 * 2**20


def due_times_s(scenario: Scenario) -> np.ndarray:
    """Give the due time of each request, in seconds from the start, rising, float64.

    Gaps are drawn at an average of 1 and mapped through the inverse of the cumulative rate, so that every kind of
    spacing follows every course of rates.

    Raises:
        LoadTestError: If there are none or too many, a load has no capacity, or a trace's file cannot be read.
    """
    if scenario.arrivals.file is not None:
        due_s = read_trace(scenario.arrivals, scenario.arrivals.file)
    else:
        rates = [phase.rates(scenario.capacity) for phase in scenario.phases]
        due_s = _of_phases(scenario.arrivals, scenario.phases, rates, scenario.seed, scenario.max_requests)
    due_s = due_s[: scenario.max_requests]
    if not len(due_s):
        raise LoadTestError("phases: no request is due in so short a time at so low a rate")
    return due_s


def planned_seconds(scenario: Scenario, due_s: np.ndarray) -> float:
    """Give how long requests are due: the phases' length, or up to the last if the arrivals end before."""
    is_cut = len(due_s) >= scenario.max_requests or not scenario.phases
    return max(float(due_s[-1]), 1e-9) if is_cut else scenario.seconds


def _of_phases(
    arrivals: Arrivals, phases: Sequence[Phase], rates: Sequence[tuple[float, float]], seed: int, at_most: int
) -> np.ndarray:
    lengths_s = np.array([phase.seconds for phase in phases])
    expected = lengths_s * np.array([(start + end) / 2 for start, end in rates])
    ends = np.cumsum(expected)
    if ends[-1] > MAX_ARRIVALS:
        raise LoadTestError(f"phases: must be at most {MAX_ARRIVALS} requests together; these are {ends[-1]:.0f}")
    work = _unit_arrivals(arrivals, float(ends[-1]), seed)[:at_most]
    phase = np.searchsorted(ends, work, side="right").clip(max=len(phases) - 1)
    start, end = np.array(rates).T[:, phase]
    within = work - (ends - expected)[phase]
    # Solves start·t + (end - start)/(2·length)·t² = within for t, in the form that survives end = start.
    slope = (end - start) / lengths_s[phase]
    t = 2 * within / (start + np.sqrt(np.maximum(start**2 + 2 * slope * within, 0.0)))
    due_s = (np.cumsum(lengths_s) - lengths_s)[phase] + np.minimum(t, lengths_s[phase])
    before_end: np.ndarray = due_s[due_s < lengths_s.sum()]
    return before_end


def _unit_arrivals(arrivals: Arrivals, total: float, seed: int) -> np.ndarray:
    """Give rising numbers below a total, on average one per unit."""
    rng = np.random.default_rng(seed)
    if arrivals.kind == "fixed":
        return np.arange(1.0, total)
    drawn: list[np.ndarray] = []
    reached = 0.0
    while reached < total:
        count = int(total - reached) + 100
        if arrivals.kind == "poisson":
            gaps = rng.exponential(1.0, count)
        else:
            gaps = rng.gamma(1 / arrivals.cv2, arrivals.cv2, count)
        times = reached + np.cumsum(gaps)
        drawn.append(times)
        reached = float(times[-1])
    together = np.concatenate(drawn)
    within: np.ndarray = together[together < total]
    return within


def read_trace(arrivals: Arrivals, file: Path) -> np.ndarray:
    """Read a trace's arrivals: a number per line, in seconds; `#` begins a comment.

    Raises:
        LoadTestError: If it cannot be read, or is not of rising times or of gaps.
    """
    try:
        if file.stat().st_size > MAX_TRACE_BYTES:
            raise LoadTestError(f"arrivals.file: {file.name!r} is over {MAX_TRACE_BYTES} bytes")
        lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
        seconds = np.array([float(line) for line in lines if line])
    except OSError as error:
        raise LoadTestError(f"arrivals.file: {str(file)!r}: {error.strerror}") from None
    except ValueError:
        raise LoadTestError(f"arrivals.file: {file.name!r} must hold a number per line") from None
    gaps = seconds if arrivals.holds == "gaps" else np.diff(seconds, prepend=seconds[:1])
    if not len(gaps) or not np.isfinite(gaps).all() or (gaps < 0).any():
        raise LoadTestError(f"arrivals.file: {file.name!r} must hold rising times, or gaps of at least 0")
    due_s: np.ndarray = np.cumsum(gaps) / arrivals.speed
    if len(due_s) > MAX_ARRIVALS or due_s[-1] > MAX_SECONDS:
        raise LoadTestError(f"arrivals.file: at most {MAX_ARRIVALS} requests in {MAX_SECONDS:g} s")
    return due_s
