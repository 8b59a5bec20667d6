"""Which input is asked when: all alike, or a drift between easy and hard ones."""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from offramp_loadtest.errors import LoadTestError
from offramp_loadtest.payloads import MAX_FILE_BYTES, Payload, refuse_expansion
from offramp_loadtest.scenario import Difficulty


def choose(payloads: Sequence[Payload], due_s: np.ndarray, planned_s: float, drift: Difficulty, seed: int) -> list[int]:
    """Choose the payload of each arrival.

    Without drift, every payload comes once, in random order, before one comes again.

    Raises:
        LoadTestError: If the inputs should drift and their difficulty is not known.
    """
    rng = np.random.default_rng([seed, 1])
    if drift.drift == "none":
        order = rng.permutation(len(payloads))
        return [int(index) for index in np.resize(order, len(due_s))]
    scores = [payload.difficulty for payload in payloads]
    if any(score is None for score in scores):
        raise LoadTestError("difficulty: the data needs an array 'difficulty', or difficulty.scores a file")
    easy_to_hard = np.argsort(np.array(scores, dtype=np.float64), kind="stable")
    low = (1 - drift.spread) * hardness(due_s, planned_s, drift)
    place = low + drift.spread * rng.random(len(due_s))
    return [int(index) for index in easy_to_hard[(place * len(payloads)).astype(int).clip(max=len(payloads) - 1)]]


def hardness(due_s: np.ndarray, planned_s: float, drift: Difficulty) -> np.ndarray:
    """Give how hard each moment's inputs are, from 0 to 1."""
    if drift.drift == "linear":
        way: np.ndarray = due_s / planned_s
    else:
        way = 0.5 + 0.5 * np.sin(2 * np.pi * due_s / drift.period_s)
    return drift.low + (drift.high - drift.low) * way


def with_scores(payloads: Sequence[Payload], path: Path) -> tuple[Payload, ...]:
    """Give payloads the difficulties in a file.

    Args:
        payloads: One per score.
        path: See `Difficulty.scores`.

    Raises:
        LoadTestError: If the file cannot be read, or does not hold a finite number per payload.
    """
    scores = _scores(path)
    if scores.ndim != 1 or len(scores) != len(payloads) or not np.isfinite(scores).all():
        raise LoadTestError(
            f"difficulty.scores: {path.name!r} must hold a finite number for each of {len(payloads)} inputs"
        )
    return tuple(replace(payload, difficulty=float(score)) for payload, score in zip(payloads, scores, strict=True))


def _scores(path: Path) -> np.ndarray:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise LoadTestError(f"difficulty.scores: {path.name!r} is over {MAX_FILE_BYTES} bytes")
        refuse_expansion(path)
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded.astype(np.float64)
        with loaded:
            if "difficulty" in loaded.files:
                return np.asarray(loaded["difficulty"], dtype=np.float64)
            return _doubt(np.asarray(loaded["logits_0"], dtype=np.float64))
    except OSError as error:
        raise LoadTestError(f"difficulty.scores: {str(path)!r}: {error.strerror or error}") from None
    except (ValueError, TypeError, EOFError, KeyError, IndexError, zipfile.BadZipFile, zlib.error):
        raise LoadTestError(
            f"difficulty.scores: {path.name!r} holds neither an array 'difficulty' nor a trace"
        ) from None


def _doubt(logits_NC: np.ndarray) -> np.ndarray:
    """Give 1 minus the largest probability."""
    exp_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    doubt_N: np.ndarray = 1 - exp_NC.max(axis=1) / exp_NC.sum(axis=1)
    return doubt_N
