"""How much memory do rows in flight take, and is it freed at once? As many requests as admission lets in.

    python server/benchmarks/inflight_memory.py

Exports a convolutional network with four exits and random weights and opens it in the engine, without HTTP, with room
for 10,000 rows. No stage runs until so many requests are in, each with one row and an input of its own; one more must
be refused. Then all run to full depth, and before every dispatch the tensors that rows in flight hold are counted, each
once and whole, however little of it is needed. Everything happens three times: what the last series takes more than
the second is growth.

Python's garbage collector is off meanwhile, so that what is freed is freed because nobody refers to it any more. Prints
a table, and one of what bounds the tensors. Nothing is asserted but that the one too many is refused and that every
request gets its one answer. Runs on Linux with glibc.
"""

import ctypes
import gc
import math
import multiprocessing
import os
import platform
import resource
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import onnxruntime
import typer
from offramp_contract.errors import Overloaded
from offramp_contract.manifest import Manifest
from offramp_runtime import Bundle, DeviceTensor, StageExecutor, StageOutput, open_bundle, open_device
from offramp_server import Engine
from offramp_server.boundary import LEAST_SHARE_KEPT
from offramp_server.engine_settings import EngineSettings
from offramp_server.fields import NoLimits, read_routing
from offramp_server.messages import Progress, Result, RowAnswer
from offramp_server.served import ServedModel
from offramp_server.submission import Sample, Submission
from rich.console import Console
from rich.table import Table
from stages_and_graph import SIZES, export_both

SIZE = SIZES[0]
NUM_SERIES = 3
WARM_UP_S = 2.0
LONGEST_RUN_S = 600.0
LONGEST_FREEING_S = 1.0

console = Console(width=140)


class Look(NamedTuple):
    """What rows in flight hold when a dispatch is about to run, its own rows among them; or the most of each number.

    Attributes:
        rss_bytes: Memory of the process.
        input_bytes: Held by rows that have not run their first stage.
        carry_bytes: Held by those that have.
        tensor_bytes: Both.
        num_begun: How many have.
        excess_bytes: What these hold beyond what they need.
        excess: How many times what they need they hold.
        num_stray: Tensors that a row in flight once held, that none holds any more, and that are there nevertheless.
    """

    rss_bytes: int = 0
    input_bytes: int = 0
    carry_bytes: int = 0
    tensor_bytes: int = 0
    num_begun: int = 0
    excess_bytes: int = 0
    excess: float = 0.0
    num_stray: int = 0


class Series(NamedTuple):
    """What one series of requests took.

    Attributes:
        before_bytes: Memory of the process before the first request.
        queued_bytes: When all wait and none has run.
        after_bytes: When all are answered.
        trimmed_bytes: When the allocator has then given back what it had kept for later.
        num_dispatches: How often a stage ran.
        most: Of each number, over all dispatches.
        num_left: Tensors that are there although all are answered.
    """

    before_bytes: int
    queued_bytes: int
    after_bytes: int
    trimmed_bytes: int
    num_dispatches: int
    most: Look
    num_left: int


class Watch:
    """Counts what rows in flight hold. Its clock stands still meanwhile: to the engine, a look takes no time."""

    def __init__(self, manifest: Manifest) -> None:
        self._carry_bytes = [stage.carry_bytes for stage in manifest.stages]
        self._spent_s = 0.0
        self._seen: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()
        self.start()

    def start(self) -> None:
        """Forget what was counted."""
        self.submissions: list[Submission] = []
        self.most, self.num_looks = Look(), 0

    @property
    def num_alive(self) -> int:
        """Tensors there are, of all that a row in flight has held."""
        return len(self._seen)

    def clock(self) -> float:
        """Give seconds, those of the looks left out."""
        return time.monotonic() - self._spent_s

    def look(self) -> None:
        """Count, on the engine's thread: nothing moves meanwhile."""
        started = time.monotonic()
        self.most = Look._make(map(max, self.most, self._count()))
        self.num_looks += 1
        self._spent_s += time.monotonic() - started

    def _count(self) -> Look:
        rows = [sample for submission in self.submissions for sample in submission.samples]
        begun = [sample for sample in rows if sample.next_stage]
        inputs, carries = held(sample for sample in rows if not sample.next_stage), held(begun)
        tensors = {**inputs, **carries}
        self._seen.update({key: tensors[key] for key in tensors.keys() - set(self._seen)})
        needed_bytes = sum(self._carry_bytes[sample.next_stage - 1] for sample in begun)
        input_bytes, carry_bytes = (sum(array.nbytes for array in part.values()) for part in (inputs, carries))
        return Look(
            rss_bytes=rss_bytes(),
            input_bytes=input_bytes,
            carry_bytes=carry_bytes,
            tensor_bytes=input_bytes + carry_bytes,
            num_begun=len(begun),
            excess_bytes=carry_bytes - needed_bytes,
            excess=carry_bytes / needed_bytes if begun else 0.0,
            num_stray=len(self._seen) - len(tensors),
        )


class Turnstile:
    """A model's stages, none of which runs before it is opened; stands in for its executor."""

    def __init__(self, executor: StageExecutor, watch: Watch) -> None:
        self._executor, self._watch = executor, watch
        self.device = executor.device
        self.is_open = threading.Event()

    def run(self, stage_index: int, carries: Mapping[str, DeviceTensor]) -> StageOutput:
        """Run a stage, once it may and those who count have looked."""
        self.is_open.wait()
        self._watch.look()
        return self._executor.run(stage_index, carries)


class Answers:
    """Counts the answers that each request gets."""

    def __init__(self, num_owed: int) -> None:
        self._num_owed = num_owed
        self._counts: Counter[Submission] = Counter()
        self._num_errors = 0
        self._has_all = threading.Event()

    def deliver(self, events: list[tuple[Submission, Progress | Result]]) -> None:
        """Take answers, on the engine's thread."""
        for submission, event in events:
            if isinstance(event, Result):
                self._counts[submission] += 1
                self._num_errors += sum(not isinstance(answer, RowAnswer) for answer in event.rows)
        if len(self._counts) == self._num_owed:
            self._has_all.set()

    def wait(self) -> None:
        """Block until each request has an answer."""
        if not self._has_all.wait(LONGEST_RUN_S):
            missing = self._num_owed - len(self._counts)
            raise SystemExit(f"{missing} requests have no answer after {LONGEST_RUN_S:.0f} seconds")

    def check(self) -> None:
        """Raise unless each request has one answer, which is no error."""
        if self._num_errors:
            raise SystemExit(f"{self._num_errors} rows were answered with an error")
        if self._counts.total() != self._num_owed:
            raise SystemExit(f"{self._num_owed} requests got {self._counts.total()} answers")


class Bench:
    """An engine with one model that answers at full depth."""

    def __init__(self, bundle: Bundle, rows: int, threads: int, seed: int) -> None:
        manifest = bundle.manifest
        self._num_rows = rows
        self._random = np.random.default_rng(seed)
        self._watch = Watch(manifest)
        settings = EngineSettings(
            max_inflight_samples=rows, max_wait_ms=math.inf, default_latency_ms=None, warm_up_s=WARM_UP_S, runners=1
        )
        self.engine = Engine(open_device("cpu", threads), settings, clock=self._watch.clock)
        self.served = self.engine.add_model(bundle)
        self._turnstile = Turnstile(self.served.executor, self._watch)
        self.served.executor = self._turnstile  # type: ignore[assignment]
        fields = {"policy": {"kind": "fixed", "exit": len(manifest.exits) - 1}}
        self._options = read_routing(fields, manifest, self.served.calibration, NoLimits()).options

    def run(self) -> Series:
        """Fill the queue, and let it run."""
        gc.collect()
        gc.disable()
        try:
            return self._run()
        finally:
            gc.enable()
            self._turnstile.is_open.set()

    def _run(self) -> Series:
        watch, answers = self._watch, Answers(self._num_rows)
        watch.start()
        self._turnstile.is_open.clear()
        before_bytes = trimmed_rss_bytes()
        for _ in range(self._num_rows):
            watch.submissions.append(self._send(answers))
        queued_bytes = rss_bytes()
        self._send_one_too_many(answers)
        self._turnstile.is_open.set()
        answers.wait()
        num_left = self._wait_until_freed()
        answers.check()
        del answers
        watch.submissions = []
        return Series(
            before_bytes=before_bytes,
            queued_bytes=queued_bytes,
            after_bytes=rss_bytes(),
            trimmed_bytes=trimmed_rss_bytes(),
            num_dispatches=watch.num_looks,
            most=watch.most,
            num_left=num_left,
        )

    def _send(self, answers: Answers) -> Submission:
        (tensor,) = self.served.manifest.inputs
        row = self._random.normal(size=(1, *tensor.shape)).astype(tensor.dtype)
        return self.engine.submit(self.served, {tensor.name: row}, self._options, answers)

    def _send_one_too_many(self, answers: Answers) -> None:
        try:
            self._send(answers)
        except Overloaded:
            return
        raise SystemExit(f"{self._num_rows} rows were in flight, and one more was let in")

    def _wait_until_freed(self) -> int:
        """Wait until the engine's thread has left its last round; gives the tensors that stay for longer."""
        give_up_s = time.monotonic() + LONGEST_FREEING_S
        while (self.engine.num_inflight or self._watch.num_alive) and time.monotonic() < give_up_s:
            time.sleep(0.001)
        return self._watch.num_alive


def held(samples: Iterable[Sample]) -> dict[int, np.ndarray]:
    """Give the arrays that rows keep alive, each once: a view keeps what it is a view of."""
    carried = [sample.carries for sample in samples]
    tensors = [tensor for carries in carried for tensor in carries.batch.tensors.values()]
    tensors += [tensor for carries in carried for tensor, _ in (carries.earlier or {}).values()]
    return {id(whole): whole for whole in map(owner, tensors)}


def owner(array: np.ndarray) -> np.ndarray:
    """Give the array whose memory a view shows."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def rss_bytes() -> int:
    """Give the memory of this process, as Linux counts it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def trimmed_rss_bytes() -> int:
    """Give the memory of this process without what the allocator keeps for later."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return rss_bytes()


def export(folder: Path) -> Bundle:
    """Export the network, in a process of its own: its memory is none of the engine's."""
    exporting = multiprocessing.get_context("spawn").Process(target=export_both, args=(SIZE, folder))
    exporting.start()
    exporting.join()
    if exporting.exitcode:
        raise SystemExit("the network could not be exported")
    return open_bundle(folder / "stages")


def measured(series: Sequence[Series], rows: int) -> Table:
    """Write a line for each number, with a column for each series."""
    table = _table("measured", *(f"series {index + 1}" for index in range(len(series))))

    def add(name: str, numbers: Iterable[str]) -> None:
        table.add_row(name, *numbers)

    add("memory before, MB", [_mb(one.before_bytes) for one in series])
    add("with all waiting", [_mb(one.queued_bytes) for one in series])
    add("most while they ran", [_mb(one.most.rss_bytes) for one in series])
    add("with all answered", [_mb(one.after_bytes) for one in series])
    add("of it in use: without what the allocator keeps", [_mb(one.trimmed_bytes) for one in series])
    add("inputs of all waiting, MB", [_mb(one.most.input_bytes) for one in series])
    add("what else all waiting add, bytes a row", [f"{_object_bytes(one) / rows:,.0f}" for one in series])
    add("dispatches", [f"{one.num_dispatches:,}" for one in series])
    add("most rows past their first stage", [f"{one.most.num_begun:,}" for one in series])
    add("most carries held, MB", [_mb(one.most.carry_bytes) for one in series])
    add("most carries held beyond those needed, MB", [_mb(one.most.excess_bytes) for one in series])
    add("most carries held over those needed", [f"{one.most.excess:.1f}" for one in series])
    add("most inputs and carries, MB", [_mb(one.most.tensor_bytes) for one in series])
    add("tensors of nobody before a dispatch, at most", [f"{one.most.num_stray}" for one in series])
    add("tensors left with all answered", [f"{one.num_left}" for one in series])
    return table


def _object_bytes(series: Series) -> int:
    """Give what all waiting rows add to the process beyond their inputs."""
    return series.queued_bytes - series.before_bytes - series.most.input_bytes


def bounds(served: ServedModel, rows: int) -> Table:
    """Write down what bounds the tensors of so many rows."""
    manifest, max_batch = served.manifest, served.max_batch
    input_bytes = sum(math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize for tensor in manifest.inputs)
    carry_bytes = max(stage.carry_bytes for stage in manifest.stages)
    needed_bytes = rows * max(input_bytes, carry_bytes)
    inputs_bytes, begun = rows * input_bytes, min(len(manifest.stages) * max_batch, rows)
    table = _table("bounds of the tensors", "")
    for name, number in {
        "a row needs, before its first stage, bytes": f"{input_bytes:,}",
        "a row needs, behind a stage, at most, bytes": f"{carry_bytes:,}",
        f"{rows:,} inputs, and {begun} rows behind a stage, MB": _mb(inputs_bytes + begun * carry_bytes),
        f"the same where each holds a whole batch of {max_batch}, MB": _mb(
            inputs_bytes + begun * max_batch * carry_bytes
        ),
        f"{rows:,} rows where each needs most, MB": _mb(needed_bytes),
        f"{1 / LEAST_SHARE_KEPT:g} times that: all have just parted from their batch, MB": _mb(
            needed_bytes / LEAST_SHARE_KEPT
        ),
        f"{max_batch} times that: each is the last of its batch, MB": _mb(needed_bytes * max_batch),
    }.items():
        table.add_row(name, number)
    return table


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def main(
    *,
    rows: Annotated[int, typer.Option(min=1, help="Rows in flight.")] = 10_000,
    threads: Annotated[int, typer.Option(min=1, help="Threads behind a dispatch.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
) -> None:
    """Measure, and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = export(Path(folder))
        bench = Bench(bundle, rows, threads, seed)
    with bench.engine:
        series = [bench.run() for _ in range(NUM_SERIES)]
    console.print(measured(series, rows), bounds(bench.served, rows), sep="\n")
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread(s), load {os.getloadavg()[0]:.1f}; Python "
        f"{platform.python_version()}, ONNX Runtime {onnxruntime.__version__}; {rows:,} rows, seed {seed}",
        highlight=False,
    )


if __name__ == "__main__":
    typer.run(main)
