"""A model as the engine serves it: its stages on the device, its measured profile, and what follows from both."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import count
from typing import TypeAlias

import numpy as np
from offramp_contract.calibration import Calibration, OperatingPoint
from offramp_contract.manifest import Manifest
from offramp_contract.statistics import FloatArray
from offramp_runtime import Bundle, Device, DeviceTensor, StageExecutor

from offramp_server.carries import Batch, Carries
from offramp_server.gating import Gating, Hop
from offramp_server.gears import Gears
from offramp_server.ladder import Gear
from offramp_server.messages import Loaded, RequestOptions
from offramp_server.profile import Profile
from offramp_server.row_costs import RowCosts
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
        gating: Which stage a row runs next.
        profile: How long its stages take here.
        tally: What it has done so far; written by the engine's thread only.
        ladder: Its gears; empty if it has none.
        gears: Which of them requests get; None if it has none. Touched by admission only.
        costs: What its rows cost in each gear.
    """

    def __init__(
        self, name: str, bundle: Bundle, device: Device, max_batch: int, ladder: tuple[Gear, ...] = ()
    ) -> None:
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
        gated = [index for index, stage in enumerate(stages) if stage.gates]
        exit_stages = [exit_.stage for exit_ in self.manifest.exits]
        self.profile = Profile(exit_stages, len(stages), self.max_batch, gated, device.batch_sizes)
        self.queue_keys = [QueueKey(self.key, index, self.manifest.precision) for index in range(len(stages))]
        self.ladder = ladder
        self.costs = RowCosts(self.manifest, self.profile, ladder)
        self.gears = Gears(len(ladder), self.costs.asked_s) if ladder else None
        self.gating = Gating(self.manifest)
        self.tally = Tally()
        self._flops = [stage.flops for stage in stages]
        self._all_flops = max(sum(self._flops), 1)

    def depth_of(self, stages: Sequence[int]) -> float:
        """Give the share of the full path's FLOPs that these stages make."""
        return sum([self._flops[stage] for stage in stages]) / self._all_flops

    def expected_s(self, point: OperatingPoint) -> float:
        """Expect a row served by an operating point to run this many seconds on average, alone on this machine."""
        stage_s = [stage.mean_s(1) * self.profile.open_rate(i) for i, stage in enumerate(self.profile.stages)]
        return sum(
            rate * sum(stage_s[: exit_.stage + 1])
            for rate, exit_ in zip(point.exit_rates, self.manifest.exits, strict=True)
        )

    def in_gear(self, options: RequestOptions, now: float) -> tuple[RequestOptions, int | None]:
        """Give what a request that arrives now is served by, and its gear; None if no gear is its business."""
        if self.gears is None or not options.is_free:
            return options, None
        gear = self.gears.at(now)
        return self.ladder[gear].applied_to(options) if gear else options, gear

    @property
    def loaded(self) -> Loaded:
        """Name its stages, exits and gates for those who count."""
        variants = (key.variant for key in self.queue_keys)
        stages = tuple(zip((stage.name for stage in self.manifest.stages), variants, strict=True))
        exits = tuple(exit_.name for exit_ in self.manifest.exits)
        gates = tuple(gate.name for gate in self.manifest.gates)
        return Loaded(self.name, self.version, stages, exits, gates, len(self.ladder))

    def gather(self, stage: int, rows: Sequence[Carries], num_padded: int) -> dict[str, DeviceTensor]:
        """Put together what a stage reads, from what each row holds; the last row repeats up to so many rows."""
        missing = max(num_padded, self.manifest.min_batch) - len(rows)
        if missing > 0:
            rows = [*rows, *[rows[-1]] * missing]
        batch, places = rows[0].batch, [row.place for row in rows]
        is_one = all(row.batch is batch for row in rows)
        is_whole = is_one and places == batch.places
        gather, feeds = self.executor.device.gather, {}
        for name in self.manifest.stages[stage].inputs:
            tensor = batch.tensors.get(name) if is_one else None
            if tensor is None:
                feeds[name] = gather(*zip(*(row[name] for row in rows), strict=True))
            else:
                feeds[name] = tensor if is_whole else gather([tensor] * len(rows), places)
        return feeds

    def compact(
        self, hop: Hop, tensors: Mapping[str, DeviceTensor], num_rows: int, places: Sequence[int] | None
    ) -> Batch:
        """Keep, of tensors at hand at a boundary, those that are needed behind it, cut down to the rows at some places.

        Args:
            hop: Which stage the rows run next.
            tensors: What the stage before has read and written.
            num_rows: Number of rows in them.
            places: The rows that go on this way; None if all do.

        Returns:
            The tensors under the names by which they are read; where a stage was skipped, one may have several.
        """
        if places is None:
            return Batch({name: tensors[source] for name, source in hop.fresh}, num_rows)
        take = self.executor.device.take
        taken = {source: take(tensors[source], places) for source in {source for _, source in hop.fresh}}
        return Batch({name: taken[source] for name, source in hop.fresh}, len(places))

    def temperature(self, exit_index: int) -> float:
        """Give an exit's calibrated temperature."""
        return self.calibration.temperatures[exit_index]

    def warm_up(self, clock: Clock, budget_s: float) -> Iterator[float]:
        """Measure every stage at growing batch sizes, yielding before each run so that serving can go on between them.

        Each round goes through all sizes, so that a slow moment of the machine is one for all of them: the choice
        between batch sizes depends on how they compare.

        Args:
            clock: The engine's clock, seconds.
            budget_s: Roughly how long it may take in all. A size is left out, with those above it, when its runs would
                not fit any more; the profile extends beyond the last.

        Yields:
            Seconds that the next run is expected to take; 0 for the very first of a stage.
        """
        inputs: dict[int, dict[str, DeviceTensor]] = {}
        timings: dict[int, list[list[float]]] = {}
        planned_s, expected_s = 0.0, [0.0] * len(self.manifest.stages)
        for size in _sizes_to_measure(self.max_batch, self.executor.device.batch_sizes):
            if timings:
                before = max(timings)
                expected_s = [seconds * size / before for seconds in timings[before][0]]
                if planned_s + sum(expected_s) * (1 + WARM_UP_RUNS) > budget_s:
                    break
            drawn = random_inputs(self.manifest, max(size, self.manifest.min_batch))
            inputs[size] = {name: self.executor.device.upload(array) for name, array in drawn.items()}
            first_s = yield from self._run_timed(inputs[size], clock, expected_s, is_first=True)
            timings[size] = [(yield from self._run_timed(inputs[size], clock, first_s))]
            planned_s += sum(first_s) + sum(timings[size][0]) * WARM_UP_RUNS
        for _ in range(WARM_UP_RUNS - 1):
            for size, runs in timings.items():
                runs.append((yield from self._run_timed(inputs[size], clock, runs[-1])))
        for size, runs in timings.items():
            for stage, seconds in zip(self.profile.stages, zip(*runs, strict=True), strict=True):
                stage.calibrate(size, seconds)

    def _run_timed(
        self, inputs: Mapping[str, DeviceTensor], clock: Clock, expected_s: Sequence[float], *, is_first: bool = False
    ) -> Generator[float, None, list[float]]:
        """Run all stages one after another, yielding before each what it is expected to take; gives what each took."""
        carries, seconds = dict(inputs), []
        for index, stage_s in enumerate(expected_s):
            if is_first:
                yield stage_s
                self.executor.tune(index, carries)
            yield stage_s
            started_s = clock()
            output = self.executor.run(index, carries)
            seconds.append(clock() - started_s)
            carries |= output.carries
        return seconds


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
