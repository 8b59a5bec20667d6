"""A model as the engine serves it: its stages on the device, its measured profile, and what follows from both."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count

from offramp_contract.calibration import Calibration, OperatingPoint
from offramp_contract.manifest import Manifest
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
from offramp_server.warm_up import Clock, WarmUp
from offramp_server.widths import Width

__all__ = ["Clock", "ServedModel"]

VERSION_LENGTH = 12
_loads = count()


class ServedModel:
    """One loaded bundle under the name it is served by.

    Args:
        name: The name clients use.
        bundle: The opened bundle.
        device: Where its stages run.
        max_batch: Most rows in one dispatch.
        ladder: Its gears.
        runners: How many dispatches run side by side, each with all the threads of `device`; None if they share these.

    Attributes:
        name: The name clients use.
        version: The first 12 hex digits of the model digest.
        bundle: The opened bundle.
        executor: Its stages on the device; touched by the engine's threads only.
        gating: Which stage a row runs next.
        profile: How long its stages take here.
        wide: How its dispatches run while few rows wait, or always; goes by `profile`.
        narrow: How they run side by side while many do, if the warm-up found that this pays.
        tally: What it has done so far; written by the engine's thread only.
        ladder: Its gears; empty if it has none.
        gears: Which of them requests get; None if it has none. Touched by admission only.
        costs: What its rows cost in each gear.
    """

    def __init__(
        self,
        name: str,
        bundle: Bundle,
        device: Device,
        max_batch: int,
        ladder: tuple[Gear, ...] = (),
        *,
        runners: int | None = 1,
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
        self.wide = Width(self.profile, 0, runners) if runners else Width(self.profile, device.threads)
        self.narrow: Width | None = None
        self._narrow_executor: StageExecutor | None = None
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
        is_one = len({row.batch for row in rows}) == 1
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
        """Measure every stage at growing batch sizes, and side by side where dispatches share threads out.

        Args:
            clock: The engine's clock, seconds.
            budget_s: Roughly how long each of both may take.

        Yields:
            Before each run, so that serving can go on between them, the seconds that it is expected to take.
        """
        warm_up = WarmUp(self.bundle, self.executor, self.profile, clock)
        yield from warm_up.measure(self.max_batch, budget_s)
        if self.wide.num_threads:
            found = yield from warm_up.find_narrow(budget_s)
            if found is not None:
                self.narrow, self._narrow_executor = found

    def executor_of(self, width: Width) -> StageExecutor:
        """Give what runs the stages of a dispatch."""
        return self._narrow_executor if width is self.narrow and self._narrow_executor is not None else self.executor

    def observe_round(self, width: Width, stage: int, num_rows: int, seconds: float, *, others_wait: bool) -> None:
        """Take into account what a dispatch took, all told; admission goes by the seconds of the whole device."""
        width.profile.observe_round(stage, num_rows, seconds, others_wait=others_wait)
        if width is not self.wide:
            device_s = seconds * width.num_threads / self.wide.num_threads
            self.profile.observe_round(stage, num_rows, device_s, others_wait=others_wait)
