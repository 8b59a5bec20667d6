"""How long stages take on this machine, measured through the executor that serves.

Bundles that are to be compared run in turn, round by round, to and fro, so that what else the machine does hits all
alike; a comparison takes the median over the rounds of what differed within each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Final

import numpy as np
from offramp_contract.errors import CalibrationError
from offramp_contract.manifest import Manifest
from offramp_contract.statistics import FloatArray
from offramp_runtime import Bundle, Device, DeviceTensor, StageExecutor

ROUNDS: Final = 31
_WARM_UP_ROUNDS: Final = 5
_MAX_ROUNDS: Final = 10_000


@dataclass(frozen=True, slots=True)
class StageTimes:
    """How long a bundle's stages took.

    Attributes:
        manifest: The bundle's.
        batch_size: Rows a run.
        ms_RK: Milliseconds of each of R rounds and K stages, for the whole batch.
    """

    manifest: Manifest
    batch_size: int
    ms_RK: FloatArray

    @property
    def ms_to_exit_E(self) -> FloatArray:
        """Milliseconds a row, from its input to each exit: medians over the rounds, added up."""
        ms_K = np.cumsum(np.median(self.ms_RK, axis=0)) / self.batch_size
        return np.asarray(ms_K[[exit_.stage for exit_ in self.manifest.exits]])

    def ms_between(self, before: int, exit_index: int) -> FloatArray:
        """Milliseconds a row from behind one exit (-1: from the input) to another, in each round (R,)."""
        start = self.manifest.exits[before].stage + 1 if before >= 0 else 0
        stop = self.manifest.exits[exit_index].stage + 1
        return np.asarray(self.ms_RK[:, start:stop].sum(axis=1) / self.batch_size)


def time_stages(
    bundles: Sequence[Bundle], device: Device, inputs: Mapping[str, np.ndarray], rounds: int = ROUNDS
) -> list[StageTimes]:
    """Time every stage of some bundles, all rows at full depth.

    Args:
        bundles: Bundles that take the same inputs.
        device: Where they run.
        inputs: One batch, by name.
        rounds: How often each runs, after some rounds that are not counted.

    Raises:
        CalibrationError: If there are too few or too many rounds, or no rows.
    """
    batch_size = min(map(len, inputs.values()), default=0)
    if not 1 <= rounds <= _MAX_ROUNDS or not batch_size:
        raise CalibrationError(f"timing needs 1 to {_MAX_ROUNDS} rounds and at least one row")
    executors = [StageExecutor(bundle, device) for bundle in bundles]
    ms_BRK: list[list[list[float]]] = [[] for _ in bundles]
    turns = list(zip(executors, ms_BRK, strict=True))
    for index in range(_WARM_UP_ROUNDS + rounds):
        for executor, ms_RK in turns if index % 2 else reversed(turns):
            ms_K = _time_once(executor, inputs)
            if index >= _WARM_UP_ROUNDS:
                ms_RK.append(ms_K)
    return [StageTimes(bundle.manifest, batch_size, np.array(ms)) for bundle, ms in zip(bundles, ms_BRK, strict=True)]


def _time_once(executor: StageExecutor, inputs: Mapping[str, np.ndarray]) -> list[float]:
    carries: dict[str, DeviceTensor] = {name: executor.device.upload(array) for name, array in inputs.items()}
    ms_K = []
    for index in range(len(executor.manifest.stages)):
        start = perf_counter_ns()
        output = executor.run(index, carries)
        ms_K.append((perf_counter_ns() - start) / 1e6)
        carries |= output.carries
    return ms_K


@dataclass(frozen=True, slots=True)
class HeadCost:
    """What one row pays for passing an exit: its head, its decision, and one dispatch more.

    Attributes:
        flops: Of the nodes that nothing but this exit needs.
        ms: t(its stage) + t(the next) - t(both in one, without its head), a row.
        noise_ms: Two standard errors of `ms`: what it may be off by.
    """

    flops: int
    ms: float
    noise_ms: float


def head_cost(whole: StageTimes, without: StageTimes, exit_index: int) -> HeadCost:
    """Tell what an exit costs, from the times of the bundle with and without it, measured together.

    Args:
        whole: Times of the bundle.
        without: Times of the same bundle without the exit.
        exit_index: Which exit, 0-based, not the final one.
    """
    differences_R = whole.ms_between(exit_index - 1, exit_index + 1) - without.ms_between(exit_index - 1, exit_index)
    ms = float(np.median(differences_R))
    # The standard error of a median, of a deviation that outliers do not move.
    deviation = 1.4826 * float(np.median(np.abs(differences_R - ms)))
    noise_ms = 2 * 1.2533 * deviation / np.sqrt(len(differences_R))
    return HeadCost(whole.manifest.full_flops - without.manifest.full_flops, ms, float(noise_ms))
