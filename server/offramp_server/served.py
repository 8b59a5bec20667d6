"""A model as the engine serves it: its stages on the device, its measured profile, and what follows from both."""

from collections.abc import Callable, Iterator
from itertools import count
from typing import TypeAlias

import numpy as np
from offramp_contract.calibration import Calibration, OperatingPoint
from offramp_contract.manifest import Manifest
from offramp_contract.statistics import FloatArray
from offramp_runtime import Bundle, Device, DeviceTensor, StageExecutor

from offramp_server.messages import Loaded
from offramp_server.profile import Profile
from offramp_server.scheduler import QueueKey
from offramp_server.tally import Tally

Clock: TypeAlias = Callable[[], float]
"""Gives seconds; `time.monotonic` in service, a simulated clock in tests."""

VERSION_LENGTH = 12
WARM_UP_RUNS = 5
_loads = count()


class ServedModel:
    """One loaded bundle under the name it is served by.

    Attributes:
        name: The name clients use.
        version: The first 12 hex digits of the model digest.
        bundle: The opened bundle.
        executor: Its stages on the device; touched by the engine's thread only.
        profile: How long its stages take here.
        tally: What it has done so far; written by the engine's thread only.
    """

    def __init__(self, name: str, bundle: Bundle, device: Device, max_batch: int) -> None:
        self.name = name
        self.bundle = bundle
        self.manifest: Manifest = bundle.manifest
        self.calibration: Calibration = bundle.calibration
        self.version = self.manifest.model_digest[:VERSION_LENGTH]
        self.executor = StageExecutor(bundle, device)
        self.max_batch = min(max_batch, self.manifest.max_batch or max_batch)
        self.num_exits = len(self.manifest.exits)
        # Every load has a key of its own: the same model may be loaded again while an earlier load still drains.
        self.key = f"{name}@{self.version}#{next(_loads)}"
        stages = self.manifest.stages
        self.profile = Profile([exit_.stage for exit_ in self.manifest.exits], len(stages), self.max_batch)
        self.queue_keys = [QueueKey(self.key, index, self.manifest.precision) for index in range(len(stages))]
        self.live_after = [{name for later in stages[i + 1 :] for name in later.inputs} for i in range(len(stages))]
        self.tally = Tally()
        self._flops = [stage.flops for stage in stages]

    def depth_of(self, stages: tuple[int, ...]) -> float:
        """Give the share of the full path's FLOPs that these stages make."""
        return sum(self._flops[stage] for stage in stages) / max(sum(self._flops), 1)

    def expected_s(self, point: OperatingPoint) -> float:
        """Expect a row served by an operating point to run this many seconds on average, alone on this machine."""
        stage_s = [stage.mean_s(1) for stage in self.profile.stages]
        return sum(
            rate * sum(stage_s[: exit_.stage + 1])
            for rate, exit_ in zip(point.exit_rates, self.manifest.exits, strict=True)
        )

    @property
    def loaded(self) -> Loaded:
        """Name its stages and exits for those who count."""
        variants = (key.variant for key in self.queue_keys)
        stages = tuple(zip((stage.name for stage in self.manifest.stages), variants, strict=True))
        return Loaded(self.name, self.version, stages, tuple(exit_.name for exit_ in self.manifest.exits))

    def compact(
        self, stage: int, tensors: dict[str, DeviceTensor], places: list[int] | None
    ) -> dict[str, DeviceTensor]:
        """Keep, of tensors at hand after a stage, those that later stages read, cut down to the rows at some places.

        Args:
            stage: The stage that has run.
            tensors: What it read and what it wrote.
            places: The rows that go on; None if all do.
        """
        live = {name: tensor for name, tensor in tensors.items() if name in self.live_after[stage]}
        if places is None:
            return live
        return {name: self.executor.device.take(tensor, places) for name, tensor in live.items()}

    def temperature(self, exit_index: int) -> float:
        """Give an exit's calibrated temperature."""
        return self.calibration.temperatures[exit_index]

    def warm_up(self, clock: Clock, budget_s: float) -> Iterator[float]:
        """Measure every stage at growing batch sizes, yielding before each run so that serving can go on between them.

        Args:
            clock: The engine's clock, seconds.
            budget_s: Roughly how long it may take in all. Small batch sizes come first, and a size is skipped when it
                would not fit any more; the profile extends beyond the last.

        Yields:
            Seconds that the next run is expected to take; 0 for the very first of a stage.
        """
        rng = np.random.default_rng(0)
        num_stages = len(self.manifest.stages)
        sizes = sorted({1, self.max_batch, *(2**i for i in range(1, 16) if 2**i < self.max_batch)})
        spent_s = 0.0
        for size in sizes:
            expected_s = sum(stage.mean_s(size) for stage in self.profile.stages) if size > 1 else 0.0
            if expected_s * (1 + WARM_UP_RUNS) > budget_s - spent_s:
                return
            carries = self._random_inputs(rng, max(size, self.manifest.min_batch))
            for index in range(num_stages):
                seconds = [self.profile.stages[index].mean_s(size) if size > 1 else 0.0]
                for _ in range(WARM_UP_RUNS + 1):
                    yield seconds[-1]
                    started = clock()
                    output = self.executor.run(index, carries)
                    seconds.append(clock() - started)
                    spent_s += seconds[-1]
                self.profile.stages[index].calibrate(size, seconds[2:])  # neither the guess nor the first run
                carries |= output.carries

    def _random_inputs(self, rng: np.random.Generator, size: int) -> dict[str, DeviceTensor]:
        return {
            tensor.name: self.executor.device.upload(_random_array(rng, (size, *tensor.shape), tensor.dtype))
            for tensor in self.manifest.inputs
        }


def _random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Draw values that any network accepts: a standard normal for floats, 0 for indices, whose range is unknown."""
    if np.issubdtype(np.dtype(dtype), np.floating):
        values: FloatArray = rng.standard_normal(shape).astype(dtype)
        return values
    return np.zeros(shape, dtype=dtype)
