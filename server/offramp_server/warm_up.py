"""How a model is measured when it is loaded, in small steps between which serving can go on.

Every generator here yields, before each run of a stage, the seconds that it is expected to take; 0 for the very first.
"""

import logging
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from statistics import median
from typing import Final, TypeAlias, TypeVar

import numpy as np
from offramp_contract.errors import ManifestError
from offramp_contract.manifest import Manifest
from offramp_contract.statistics import FloatArray
from offramp_runtime import Bundle, DeviceTensor, StageExecutor, StageOutput

from offramp_server.profile import Profile
from offramp_server.widths import MOST_ABREAST, Width

Clock: TypeAlias = Callable[[], float]
"""Gives seconds; `time.monotonic` in service, a simulated clock in tests."""

logger = logging.getLogger(__name__)

T = TypeVar("T")
Steps: TypeAlias = Generator[float, None, T]
Rows: TypeAlias = Mapping[str, DeviceTensor]

WARM_UP_RUNS: Final = 5
SHORTEST_S: Final = 2e-3
"""Rows that take less than this through all stages gain nothing side by side: handing a dispatch to another thread, and
deciding about its rows one thread at a time, takes as long as what is gained."""
LEAST_GAIN: Final = 0.95
"""Of rows per second: what is measured in a quiet loop lacks that one dispatch's rows are routed while others run, and
that HTTP on a core holds up one dispatch and not the end of every operator. That is worth more than this lacks."""


class WarmUp:
    """Measures one model on one device.

    Args:
        bundle: The model.
        executor: Its stages, loaded there.
        profile: Where what they take is written down.
        clock: The engine's, seconds.
    """

    def __init__(self, bundle: Bundle, executor: StageExecutor, profile: Profile, clock: Clock) -> None:
        self._bundle = bundle
        self._manifest: Manifest = bundle.manifest
        self._executor = executor
        self._profile = profile
        self._clock = clock
        self._inputs: dict[int, Rows] = {}

    def measure(self, max_batch: int, budget_s: float) -> Steps[None]:
        """Measure every stage at growing batch sizes.

        Each round goes through all sizes, so that a slow moment of the machine is one for all of them: the choice
        between batch sizes depends on how they compare.

        Args:
            max_batch: The largest.
            budget_s: Roughly how long it may take in all. A size is left out, with those above it, when its runs would
                not fit any more; the profile extends beyond the last.
        """
        timings: dict[int, list[list[float]]] = {}
        planned_s, expected_s = 0.0, [0.0] * len(self._manifest.stages)
        for size in _sizes_to_measure(max_batch, self._executor.device.batch_sizes):
            if timings:
                before = max(timings)
                expected_s = [seconds * size / before for seconds in timings[before][0]]
                if planned_s + sum(expected_s) * (1 + WARM_UP_RUNS) > budget_s:
                    break
            drawn = random_inputs(self._manifest, max(size, self._manifest.min_batch))
            self._inputs[size] = {name: self._executor.device.upload(array) for name, array in drawn.items()}
            first_s = yield from self._run(size, expected_s, is_first=True)
            timings[size] = [(yield from self._run(size, first_s))]
            planned_s += sum(first_s) + sum(timings[size][0]) * WARM_UP_RUNS
        for _ in range(WARM_UP_RUNS - 1):
            for size, runs in timings.items():
                runs.append((yield from self._run(size, runs[-1])))
        _calibrate(self._profile, timings)

    def find_narrow(self, budget_s: float) -> Steps[tuple[Width, StageExecutor] | None]:
        """Find how the stages do most side by side, after `measure`; None if they gain nothing so.

        Tried are as many as there are threads, then half as many and so on, as long as that does more than what was
        tried before. Runs with every thread lie between those that are compared with them.

        Args:
            budget_s: Roughly how long it may take in all.

        Returns:
            The width, and the stages loaded for it.
        """
        if self._profile.alone_s < SHORTEST_S:
            return None
        device, best, best_gain = self._executor.device, None, LEAST_GAIN
        num_abreast = min(device.threads, MOST_ABREAST)
        each_s = budget_s / max(math.floor(math.log2(num_abreast)), 1)
        while num_abreast > 1:
            part = device.part(device.threads // num_abreast)
            if part is None:
                return None
            try:
                executor, profile = StageExecutor(self._bundle, part), self._profile.beside()
            except ManifestError as error:  # it was loaded before, so it is the memory that does not last
                logger.warning("stages cannot be loaded a second time, to run side by side: %s", error)
                break
            gain = yield from self._compare(executor, profile, num_abreast, each_s)
            if gain < best_gain:
                break
            best, best_gain = (Width(profile, part.threads, num_abreast), executor), gain
            num_abreast //= 2
        return best

    def _compare(self, executor: StageExecutor, profile: Profile, num_abreast: int, budget_s: float) -> Steps[float]:
        """Measure stages side by side at the sizes known already; gives how many times as many rows they do so."""
        sizes = self._sizes_within(budget_s, num_abreast)
        wide_s = [stage.mean_s(sizes[-1]) for stage in self._profile.stages]
        timings: dict[int, list[list[float]]] = {}
        gains = []
        with ThreadPoolExecutor(num_abreast, "offramp-warm-up") as pool:
            abreast = _Abreast(executor, pool, num_abreast)
            for size in sizes:
                expected_s = [num_abreast * stage.mean_s(size) for stage in self._profile.stages]
                timings[size] = [(yield from self._run(size, expected_s, abreast))]  # the first, which counts for none
            for _ in range(WARM_UP_RUNS):
                wide_s = yield from self._run(sizes[-1], wide_s)
                for size, runs in timings.items():
                    runs.append((yield from self._run(size, runs[-1], abreast)))
                gains.append(num_abreast * sum(wide_s) / max(sum(timings[sizes[-1]][-1]), 1e-9))
        _calibrate(profile, {size: runs[1:] for size, runs in timings.items()})
        return median(gains)

    def _sizes_within(self, budget_s: float, num_abreast: int) -> list[int]:
        """Give the sizes, the least at any rate, that so many dispatches side by side probably have time for."""
        sizes: list[int] = []
        planned_s = 0.0
        for size in self._inputs:
            planned_s += (1 + WARM_UP_RUNS) * num_abreast * sum(stage.mean_s(size) for stage in self._profile.stages)
            if sizes and planned_s > budget_s:
                break
            sizes.append(size)
        return sizes

    def _run(
        self, size: int, expected_s: Sequence[float], abreast: "_Abreast | None" = None, *, is_first: bool = False
    ) -> Steps[list[float]]:
        """Run all stages one after another; gives what each took."""
        carries, seconds = dict(self._inputs[size]), []
        run = self._executor.run if abreast is None else abreast.run
        for index, stage_s in enumerate(expected_s):
            if is_first:
                yield stage_s
                self._executor.tune(index, carries)
            yield stage_s
            started_s = self._clock()
            output = run(index, carries)
            seconds.append(self._clock() - started_s)
            carries |= output.carries
        return seconds


class _Abreast:
    """Runs a stage in several threads at once."""

    def __init__(self, executor: StageExecutor, pool: Executor, num: int) -> None:
        self._executor = executor
        self._pool = pool
        self._num = num

    def run(self, stage_index: int, carries: Rows) -> StageOutput:
        """Run it; gives what one of them gave, when all have ended."""
        running = [self._pool.submit(self._executor.run, stage_index, carries) for _ in range(self._num)]
        outputs = [run.result() for run in running]
        return outputs[0]


def _calibrate(profile: Profile, timings: Mapping[int, Sequence[Sequence[float]]]) -> None:
    for size, runs in timings.items():
        for stage, seconds in zip(profile.stages, zip(*runs, strict=True), strict=True):
            stage.calibrate(size, seconds)


def random_inputs(manifest: Manifest, num_rows: int) -> dict[str, np.ndarray]:
    """Draw rows that any network accepts: for measuring, always the same."""
    rng = np.random.default_rng(0)
    return {tensor.name: _random_array(rng, (num_rows, *tensor.shape), tensor.dtype) for tensor in manifest.inputs}


def _random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Draw values that any network accepts: a standard normal for floats, 0 for indices, whose range is unknown."""
    if np.issubdtype(np.dtype(dtype), np.floating):
        values: FloatArray = rng.standard_normal(shape).astype(dtype)
        return values
    return np.zeros(shape, dtype=dtype)


def _sizes_to_measure(max_batch: int, batch_sizes: tuple[int, ...] | None) -> list[int]:
    """Give powers of two, or the sizes that a device runs at, up to the one that the largest batch takes."""
    if batch_sizes is None:
        return sorted({1, max_batch, *(2**i for i in range(1, 16) if 2**i < max_batch)})
    return [*(size for size in batch_sizes if size < max_batch), *[s for s in batch_sizes if s >= max_batch][:1]]
