"""Networks a test can work out on paper, and the engine's loop as a simulation: real stages, a clock of our own."""

import hashlib
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gated_bundles import DECISION, Block, write_gated
from offramp_contract.calibration import CALIBRATION_FILE, Calibration
from offramp_contract.manifest import Exit, File, Manifest, Provenance, Stage, Tensor
from offramp_contract.policy_spec import compile_policy, parse_policy
from offramp_contract.statistics import FloatArray, decision_of_logits, decision_width
from offramp_runtime import Bundle, StageExecutor, open_bundle, open_device, run_gated
from offramp_runtime.whole import Outcome
from offramp_server.admission import Lot
from offramp_server.engine import Engine
from offramp_server.engine_settings import EngineSettings
from offramp_server.loop import DeviceLoop
from offramp_server.messages import Departure, Observer, Progress, RequestDone, RequestOptions, Result, StageRun
from offramp_server.profile import Profile
from offramp_server.rules import Rules
from offramp_server.scheduler import Scheduler
from offramp_server.served import ServedModel
from offramp_server.submission import Submission
from onnx import parser

WIDTH = 4
"""Every tensor is (B, 4): each value is also the scores of four classes."""


@dataclass(frozen=True)
class Step:
    """A stage that adds up what it reads; its exit's scores are `gain` times the sum, its carry the sum itself."""

    reads: tuple[str, ...]
    writes: str | None = None
    gain: float | None = None


CHAIN = (Step(("x",), "h0", 1.0), Step(("h0",), "h1", 10.0), Step(("h1",), None, 100.0))
"""The exits' scores are x, 10 x and 100 x."""
LATE = (Step(("x",), "h0", 1.0), Step(("h0",), "h1"), Step(("h1", "y"), "h2", 3.0), Step(("h2", "x", "h0"), None, 5.0))
"""Four stages, three exits, two inputs: `y` is first read by stage 2, `x` and `h0` again by the last."""


@dataclass(frozen=True)
class Net:
    """A network of steps, as a bundle and in numpy."""

    bundle: Bundle
    steps: tuple[Step, ...]

    def logits(self, inputs: Mapping[str, np.ndarray]) -> list[FloatArray]:
        """Compute every exit's scores, shape (B, 4) each."""
        values, scores = dict(inputs), []
        for step in self.steps:
            total = np.sum([values[name] for name in step.reads], axis=0, dtype=np.float32)
            if step.writes is not None:
                values[step.writes] = total
            if step.gain is not None:
                scores.append(np.float32(step.gain) * total)
        return scores

    def decisions(self, inputs: Mapping[str, np.ndarray]) -> list[FloatArray]:
        """Compute every exit's packed statistics."""
        pairs = zip(self.logits(inputs), self.bundle.calibration.temperatures, strict=True)
        return [decision_of_logits(scores, temperature) for scores, temperature in pairs]


@pytest.fixture(scope="session")
def make_net(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Net]:
    """Write and open the bundle of a network of steps."""

    def make(steps: tuple[Step, ...] = CHAIN, **manifest: Any) -> Net:
        folder = tmp_path_factory.mktemp("net")
        write_net(folder, steps, **manifest)
        return Net(open_bundle(folder), steps)

    return make


@pytest.fixture(scope="session")
def chain(make_net: Callable[..., Net]) -> Net:
    return make_net(CHAIN, name="chain")


@pytest.fixture(scope="session")
def late(make_net: Callable[..., Net]) -> Net:
    return make_net(LATE, name="late", temperatures=(1.0, 2.0, 0.5))


@dataclass(frozen=True)
class GatedNet:
    """A gated network, as a bundle and as the runtime runs it, one batch alone."""

    bundle: Bundle
    executor: StageExecutor

    def run(self, x_BD: np.ndarray, threshold_BG: np.ndarray | None = None) -> Outcome:
        return run_gated(self.executor, {"x": x_BD}, threshold_BG)


@pytest.fixture(scope="session")
def make_gated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., GatedNet]:
    """Write and open the bundle of a gated network of blocks."""

    def make(blocks: tuple[Block, ...], **fields: Any) -> GatedNet:
        bundle = open_bundle(write_gated(tmp_path_factory.mktemp("gated") / "bundle", blocks, **fields))
        return GatedNet(bundle, StageExecutor(bundle, open_device("cpu", 1)))

    return make


def write_net(
    folder: Path, steps: tuple[Step, ...], name: str = "net", temperatures: tuple[float, ...] = (), **manifest: Any
) -> None:
    (folder / "stages").mkdir()
    written = [step.writes for step in steps if step.writes is not None]
    inputs = dict.fromkeys(read for step in steps for read in step.reads if read not in written)
    stages: list[Stage] = []
    exits: list[Exit] = []
    for index, step in enumerate(steps):
        graph, path = _graph(step), f"stages/{index:02d}.onnx"
        (folder / path).write_bytes(graph)
        stages.append(
            Stage(
                name=f"stage_{index}",
                graph=File(path=path, sha256=hashlib.sha256(graph).hexdigest()),
                inputs=step.reads,
                outputs=() if step.writes is None else (step.writes,),
                exit=None if step.gain is None else len(exits),
                flops=100,
                carry_bytes=4 * WIDTH,
            )
        )
        if step.gain is not None:
            names = {"logits": "logits", "decision": "decision", "temperature": "T"}
            exits.append(Exit(name=f"exit_{len(exits)}", stage=index, num_classes=WIDTH, **names))
    written_down = Manifest(
        name=name,
        inputs=tuple(Tensor(name=tensor, dtype="float32", shape=(WIDTH,)) for tensor in inputs),
        carries=tuple(Tensor(name=tensor, dtype="float32", shape=(WIDTH,)) for tensor in written),
        stages=tuple(stages),
        exits=tuple(exits),
        provenance=Provenance(source="written by hand"),
        **manifest,
    )
    (folder / "manifest.json").write_bytes(written_down.to_bytes())
    if temperatures:
        calibration = Calibration(model_digest=written_down.model_digest, temperatures=temperatures)
        (folder / CALIBRATION_FILE).write_bytes(calibration.to_bytes())


def _graph(step: Step) -> bytes:
    reads = [f"float[batch, {WIDTH}] {name}" for name in step.reads]
    body, outputs = [f"sum = Sum ({', '.join(step.reads)})"], []
    if step.writes is not None:
        body.append(f"{step.writes} = Identity (sum)")
        outputs.append(f"float[batch, {WIDTH}] {step.writes}")
    if step.gain is not None:
        reads.append("float T")
        outputs += [f"float[batch, {WIDTH}] logits", f"float[batch, {decision_width(WIDTH)}] decision"]
        body += [
            f"gain = Constant <value_float = {step.gain:.1f}> ()",
            *(f"{word} = Constant <value_ints = [{n}]> ()" for n, word in enumerate(("zero", "one", "two"))),
            "logits = Mul (sum, gain)",
            DECISION,
        ]
    head = f"stage ({', '.join(reads)}) => ({', '.join(outputs)})"
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]>\n{head} {{\n' + "\n".join(body) + "\n}")
    serialised: bytes = model.SerializeToString()
    return serialised


@pytest.fixture(scope="session")
def options() -> Callable[..., RequestOptions]:
    """Write down how rows are routed: a policy by name or object, and any other option; `never` goes on to the end."""

    def make(policy: Any = "never", num_exits: int = 3, threshold: Any = None, **given: Any) -> RequestOptions:
        if policy == "never":
            policy = {"kind": "fixed", "exit": num_exits - 1}
        spec = parse_policy(policy, threshold, None)
        return RequestOptions(policy=compile_policy(spec, num_exits), policy_spec=spec, **given)

    return make


@dataclass
class Clock:
    """Time that moves only when a test says so."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Inbox:
    """A listener that keeps what it gets, in order."""

    events: dict[Submission, list[Progress | Result]] = field(default_factory=lambda: defaultdict(list))
    deliveries: int = 0

    def deliver(self, events: list[tuple[Submission, Progress | Result]]) -> None:
        self.deliveries += 1
        for submission, event in events:
            self.events[submission].append(event)

    def __hash__(self) -> int:
        return id(self)

    def results(self, submission: Submission) -> list[Result]:
        return [event for event in self.events[submission] if isinstance(event, Result)]

    def result(self, submission: Submission) -> Result:
        """Give a submission's one result."""
        events = self.events[submission]
        assert sum(isinstance(event, Result) for event in events) == 1
        assert isinstance(events[-1], Result)
        return events[-1]


@dataclass
class Log(Observer):
    """An observer that keeps what it is told and looks away from the rest."""

    runs: list[StageRun] = field(default_factory=list)
    departures: list[Departure] = field(default_factory=list)
    done: list[RequestDone] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    inflight: dict[str, int] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)

    def stage_ran(self, run: StageRun) -> None:
        self.runs.append(run)

    def rows_left(self, departures: list[Departure]) -> None:
        self.departures += departures

    def rows_failed(self, model: str, version: str, reason: str, num_samples: int) -> None:
        self.failures[reason] += num_samples

    def request_done(self, done: RequestDone) -> None:
        self.done.append(done)

    def rejected(self, model: str, version: str, reason: str) -> None:
        self.refusals.append(reason)

    def inflight_changed(self, model: str, version: str, num_samples: int) -> None:
        self.inflight[model] = num_samples


class Instrument:
    """A model's real executor, whose runs are counted, take scripted time, and fail or wait where a test says so.

    Attributes:
        batches: Per run the stage and its number of rows, in order.
        before: Called with the stage and what it reads, before it runs; what it raises, the stage raises.
        seconds: What a run of a stage over a batch takes on the simulated clock.
    """

    def __init__(self, served: ServedModel, clock: Clock | None = None) -> None:
        self._executor = served.executor
        self._clock = clock
        self.device = served.executor.device
        self.batches: list[tuple[int, int]] = []
        self.fed: list[dict[str, np.ndarray]] = []
        self.before: Callable[[int, Mapping[str, Any]], None] = lambda stage, feeds: None
        self.seconds: Callable[[int, int], float] = lambda stage, rows: 0.0
        served.executor = self

    def run(self, stage: int, feeds: Mapping[str, Any]) -> Any:
        num_rows = len(next(iter(feeds.values())))
        self.batches.append((stage, num_rows))
        self.fed.append(dict(feeds))
        if self._clock is not None:
            self._clock.now += self.seconds(stage, num_rows)
        self.before(stage, feeds)
        return self._executor.run(stage, feeds)

    def tune(self, stage: int, feeds: Mapping[str, Any]) -> None:
        self._executor.tune(stage, feeds)

    def rows_at(self, stage: int) -> int:
        """Count the rows a stage has run over."""
        return sum(rows for at, rows in self.batches if at == stage)


class Simulation:
    """The device's loop without a thread, over real stages that take scripted time."""

    def __init__(
        self, max_batch: int = 8, margin_s: float = 0.0, fair_share_s: float = 0.05, rules: Rules | None = None
    ) -> None:
        self.clock = Clock()
        self.inbox = Inbox()
        self.log = Log()
        self.settled: Counter[ServedModel] = Counter()
        self.cancel_signal = threading.Event()
        self.scheduler: Scheduler[Any] = Scheduler(max_batch, margin_s, fair_share_s, rules)
        self.max_batch = max_batch
        self.loop = DeviceLoop(
            self.scheduler,
            observer=self.log,
            clock=self.clock,
            margin_s=margin_s,
            on_settled=lambda lot, num_rows: self.settled.update({lot.served: num_rows}),
            cancel_signal=self.cancel_signal,
        )

    def add(self, net: Net, seconds: Callable[[int, int], float] = lambda stage, rows: 0.01) -> ServedModel:
        """Serve a network whose stage takes `seconds(stage, rows)`, and whose profile knows it."""
        served = ServedModel(net.bundle.manifest.name, net.bundle, open_device("cpu", 1), self.max_batch)
        script(served.profile, seconds, self.max_batch)
        Instrument(served, self.clock).seconds = seconds
        self.loop.add_model(served)
        return served

    def submit(
        self, served: ServedModel, inputs: Any, options: RequestOptions, budget_s: float | None = None
    ) -> Submission:
        """Put a request in; `inputs` is x, or a dict."""
        arrays = inputs if isinstance(inputs, dict) else {"x": np.atleast_2d(np.asarray(inputs, dtype=np.float32))}
        submission = Submission(
            served,
            arrays,
            options,
            listener=self.inbox,
            arrival_s=self.clock.now,
            budget_ms=None if budget_s is None else budget_s * 1e3,
            cancel_signal=self.cancel_signal,
        )
        submission.lot = Lot(served, None, 0)
        self.loop.enqueue(submission, self.clock.now)
        return submission

    def finish(self) -> None:
        """Run until nothing waits."""
        while self.loop.has_work:
            self.loop.step()

    def answer(
        self, served: ServedModel, inputs: Any, options: RequestOptions, budget_s: float | None = None
    ) -> Result:
        submission = self.submit(served, inputs, options, budget_s)
        self.finish()
        return self.inbox.result(submission)


def script(profile: Profile, seconds: Callable[[int, int], float], max_batch: int) -> None:
    """Calibrate a profile with what each stage takes at every batch size."""
    for index, stage in enumerate(profile.stages):
        for batch in range(1, max_batch + 1):
            stage.calibrate(batch, [seconds(index, batch)] * 3)


@pytest.fixture(scope="session")
def simulate() -> type[Simulation]:
    return Simulation


@pytest.fixture(scope="session")
def scripted() -> Callable[..., Profile]:
    """Build a profile from what each stage takes at every batch size; every stage ends in an exit unless told."""

    def make(
        seconds: Callable[[int, int], float],
        num_stages: int = 3,
        max_batch: int = 8,
        exit_stages: Sequence[int] | None = None,
    ) -> Profile:
        profile = Profile(exit_stages or range(num_stages), num_stages, max_batch)
        script(profile, seconds, max_batch)
        return profile

    return make


@pytest.fixture(scope="session")
def instrument() -> type[Instrument]:
    return Instrument


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def open_engine() -> Iterator[Callable[..., Engine]]:
    """Open engines with a short warm-up; all are closed at the end of the test."""
    opened: list[Engine] = []

    def open_(*nets: Net, observer: Any = None, **settings: Any) -> Engine:
        # Tests hold stages for as long as they like, which a thread that brings a row must not wait for.
        given = {"max_batch": 4, "warm_up_s": 0.02, "default_latency_ms": None, "inline_ms": 0.0} | settings
        engine = Engine(open_device("cpu", 1), EngineSettings(**given), observer)
        opened.append(engine)
        for net in nets:
            engine.add_model(net.bundle)
        return engine

    yield open_
    for engine in opened:
        engine.close()
