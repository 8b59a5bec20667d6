"""Gated networks written by hand: a row brings its gates' scores along, so that a test says which stages it runs.

Every tensor is (B, 8): four columns that the stages change and that are the classes' scores, three that pass unchanged
and are the scores of gates 0, 1 and 2, and one that sets off a mine. A stage makes 1.5 h + delta of what it reads, with
a delta of its own, so that another choice or order of stages gives another answer.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from offramp_contract.calibration import CALIBRATION_FILE, Calibration, OperatingPoint
from offramp_contract.manifest import Exit, File, Gate, Manifest, Merge, Provenance, Stage, Tensor
from offramp_contract.statistics import decision_width, num_top
from onnx import parser

CLASSES, WIDTH, MINE = 4, 8, 7
DEADLY = 1e9

DECISION = f"""
  log_classes = Constant <value_float = {math.log(CLASSES)}> ()
  k = Constant <value_ints = [{num_top(CLASSES)}]> ()
  classes = Constant <value_ints = [{", ".join(map(str, range(CLASSES)))}]> ()
  nothing = Constant <value_float = 0.0> ()
  z = Div (logits, T)
  top_z, top_i = TopK <axis = 1> (z, k)
  max_z = Slice (top_z, zero, one, one)
  max_i = Slice (top_i, zero, one, one)
  shifted = Sub (z, max_z)
  e = Exp (shifted)
  total = ReduceSum <keepdims = 1> (e, one)
  is_max = Equal (classes, max_i)
  others = Where (is_max, nothing, e)
  odds_against = ReduceSum <keepdims = 1> (others, one)
  minus_log_odds = Log (odds_against)
  log_odds = Neg (minus_log_odds)
  log_total = Log (total)
  log_p = Sub (shifted, log_total)
  p = Div (e, total)
  p_log_p = Mul (p, log_p)
  minus_h = ReduceSum <keepdims = 1> (p_log_p, one)
  minus_entropy = Div (minus_h, log_classes)
  entropy = Neg (minus_entropy)
  top_behind = Sub (top_z, max_z)
  top_e = Exp (top_behind)
  top_p = Div (top_e, total)
  p_1 = Slice (top_p, zero, one, one)
  p_2 = Slice (top_p, one, two, one)
  margin = Sub (p_1, p_2)
  top_class = Cast <to = 1> (top_i)
  decision = Concat <axis = 1> (log_odds, entropy, margin, top_p, top_class)
"""
"""From logits and T what `offramp_contract.statistics.decision_of_logits` gives; `zero`, `one`, `two` are there."""


@dataclass(frozen=True)
class Block:
    """One stage.

    Attributes:
        reads: The carries it adds up.
        writes: What it makes of them.
        scores: The gates it scores.
        gates: The gates it is behind.
        skip: What stands for `writes` where it does not run.
        has_exit: Whether its class columns are an exit's logits.
        is_mined: Whether ONNX Runtime fails on any row whose last column is `DEADLY`.
        flops: Of one row.
    """

    reads: tuple[str, ...]
    writes: str
    scores: tuple[int, ...] = ()
    gates: tuple[int, ...] = ()
    skip: str | None = None
    has_exit: bool = False
    is_mined: bool = False
    flops: int = 100


TWO = (
    Block(("x",), "h0", scores=(0,)),
    Block(("h0",), "h1", gates=(0,), skip="h0", flops=200),
    Block(("h1",), "h2", scores=(1,), has_exit=True),
    Block(("h2",), "h3", gates=(1,), skip="h2", flops=400),
    Block(("h3", "x"), "h4", has_exit=True),
)
"""A gate before each of two exits; the last stage reads the input again."""
ONE_EXIT = (
    Block(("x",), "h0", scores=(0,)),
    Block(("h0",), "h1", gates=(0,), skip="h0", flops=200),
    Block(("h1",), "h2", scores=(1,)),
    Block(("h2",), "h3", gates=(1,), skip="h2", flops=400),
    Block(("h3",), "h4", has_exit=True),
)
"""Two gates and no exit before the end."""
NESTED = (
    Block(("x",), "h0", scores=(0,)),
    Block(("h0",), "a", scores=(1,), gates=(0,), flops=200),
    Block(("a",), "b", gates=(0, 1), skip="a", flops=400),
    Block(("b", "h0"), "c", gates=(0,), skip="h0", flops=800),
    Block(("c",), "h1", has_exit=True),
)
"""A gate inside another's body: what the body makes before it is read inside only."""
CROSSED = (
    Block(("x",), "h0", scores=(0, 1)),
    Block(("h0",), "h1", gates=(0, 1), skip="h0", flops=200),
    Block(("h1",), "h2", gates=(0,), skip="h1", flops=400),
    Block(("h2",), "h3", has_exit=True),
)
"""A body behind two gates before one that is behind the first of them only."""
APART = (
    Block(("x",), "h0"),
    Block(("h0",), "n"),
    Block(("n",), "m", scores=(0,)),
    Block(("m",), "h1", gates=(0,), skip="h0", flops=200),
    Block(("h1",), "h2", has_exit=True),
)
"""What stands for the body's result is read by nobody else any more."""
CENTRAL = (
    Block(("x",), "h0", scores=(0, 1, 2)),
    Block(("h0",), "h1", gates=(0,), skip="h0", flops=200),
    Block(("h1",), "h2", gates=(1,), skip="h1", flops=400),
    Block(("h2",), "h3", has_exit=True),
    Block(("h3",), "h4", gates=(2,), skip="h3", flops=800),
    Block(("h4",), "h5", gates=(0,), skip="h4", flops=1600),
    Block(("h5", "h0"), "h6", has_exit=True),
)
"""All scores come from the first stage, bodies follow each other, and one gate is before two of them."""
CHOICE = (
    Block(("x",), "h0", gates=(0,), skip="x", flops=200),
    Block(("h0",), "h1", gates=(1,), skip="h0", flops=400),
    Block(("h1",), "h2", has_exit=True),
    Block(("h2",), "h3", gates=(2,), skip="h2", flops=800),
    Block(("h3",), "h4", has_exit=True),
)
"""Depth is the caller's choice, from the first stage on."""
PRIORITIES = (0.9, 0.5, 0.7)


def write_gated(
    folder: Path, blocks: tuple[Block, ...], name: str = "gated", priorities: tuple[float, ...] = (), **manifest: Any
) -> Path:
    """Write the bundle of a gated network.

    Args:
        folder: Where to.
        blocks: Its stages.
        name: Of the model.
        priorities: One per gate where depth is the caller's choice.
        **manifest: Other fields of the manifest; `operating_points` make a calibration.
    """
    (folder / "stages").mkdir(parents=True)
    points: tuple[OperatingPoint, ...] = manifest.pop("operating_points", ())
    stages = tuple(_stage(folder, index, block, blocks) for index, block in enumerate(blocks))
    num_gates = 1 + max(gate for block in blocks for gate in block.gates)
    names = {"logits": "logits", "decision": "decision", "temperature": "T"}
    with_exit = [index for index, block in enumerate(blocks) if block.has_exit]
    read = {tensor for block in blocks for tensor in block.reads}
    written = Manifest(
        name=name,
        inputs=(Tensor(name="x", dtype="float32", shape=(WIDTH,)),),
        carries=tuple(Tensor(name=b.writes, dtype="float32", shape=(WIDTH,)) for b in blocks if b.writes in read),
        stages=stages,
        exits=tuple(
            Exit(name=f"exit_{k}", stage=stage, num_classes=CLASSES, **names) for k, stage in enumerate(with_exit)
        ),
        gates=tuple(_gate(index, blocks, priorities) for index in range(num_gates)),
        provenance=Provenance(source="written by hand"),
        **manifest,
    )
    (folder / "manifest.json").write_bytes(written.to_bytes())
    if points:
        digest, temperatures = written.model_digest, (1.0,) * len(with_exit)
        calibration = Calibration(model_digest=digest, temperatures=temperatures, operating_points=points)
        (folder / CALIBRATION_FILE).write_bytes(calibration.to_bytes())
    return folder


def gated_rows(*rows: tuple[float, ...]) -> np.ndarray:
    """Give the input whose rows have these scores, of gates 0, 1, ..., and then class columns of their own."""
    x_BD = np.zeros((len(rows), WIDTH), dtype=np.float32)
    for i, scores in enumerate(rows):
        x_BD[i, :CLASSES] = np.roll([1.0, 0.5, 0.25, 0.0], i)
        x_BD[i, CLASSES : CLASSES + len(scores)] = scores
    return x_BD


def _gate(index: int, blocks: tuple[Block, ...], priorities: tuple[float, ...]) -> Gate:
    if priorities:
        return Gate(name=f"gate_{index}", priority=priorities[index])
    return Gate(name=f"gate_{index}", stage=next(i for i, block in enumerate(blocks) if index in block.scores))


def _stage(folder: Path, index: int, block: Block, blocks: tuple[Block, ...]) -> Stage:
    is_read = any(block.writes in later.reads for later in blocks)
    graph, path = _graph(index, block, is_read), f"stages/{index:02d}.onnx"
    (folder / path).write_bytes(graph)
    return Stage(
        name=f"stage_{index}",
        graph=File(path=path, sha256=hashlib.sha256(graph).hexdigest()),
        inputs=block.reads,
        outputs=(block.writes,) if is_read else (),
        exit=sum(earlier.has_exit for earlier in blocks[:index]) if block.has_exit else None,
        scores="scores" if block.scores else None,
        gates=block.gates,
        merges=() if block.skip is None else (Merge(run=block.writes, skip=block.skip),),
        flops=block.flops,
        carry_bytes=4 * WIDTH,
    )


def _graph(index: int, block: Block, is_read: bool) -> bytes:
    reads = [f"float[batch, {WIDTH}] {name}" for name in block.reads]
    outputs = [f"float[batch, {WIDTH}] {block.writes}"] if is_read else []
    delta_D = [0.0] * WIDTH
    delta_D[index % CLASSES] = 1.0 + index
    body = [
        *(f"{word} = Constant <value_ints = [{n}]> ()" for n, word in enumerate(("zero", "one", "two"))),
        _floats("scale", [1.5] * CLASSES + [1.0] * (WIDTH - CLASSES)),
        _floats("further", [1.0] * CLASSES + [0.0] * (WIDTH - CLASSES)),
        _floats("delta", delta_D),
        f"scaled = Mul ({block.reads[0]}, scale)",
        *(f"more_{name} = Mul ({name}, further)" for name in block.reads[1:]),
        f"{block.writes} = Sum ({', '.join(['scaled', 'delta', *(f'more_{name}' for name in block.reads[1:])])})",
    ]
    if block.is_mined:
        body[-1] = body[-1].replace("(scaled", "(scaled, mine")
        body[-1:-1] = [
            f"last = Constant <value_ints = [{MINE}]> ()",
            "limit = Constant <value_float = 1000000.0> ()",
            _floats("harmless", [0.0]),
            "flags = Gather <axis = 1> (scaled, last)",
            "flag = ReduceMax <keepdims = 0> (flags)",
            "is_mine = Greater (flag, limit)",
            "place = Cast <to = 7> (is_mine)",
            "mine = Gather (harmless, place)",
        ]
    if block.scores:
        columns = ", ".join(str(CLASSES + gate) for gate in block.scores)
        body += [
            f"columns = Constant <value_ints = [{columns}]> ()",
            f"scores = Gather <axis = 1> ({block.writes}, columns)",
        ]
        outputs.append(f"float[batch, {len(block.scores)}] scores")
    if block.has_exit:
        reads.append("float T")
        outputs += [f"float[batch, {CLASSES}] logits", f"float[batch, {decision_width(CLASSES)}] decision"]
        body += [f"end = Constant <value_ints = [{CLASSES}]> ()", f"logits = Slice ({block.writes}, zero, end, one)"]
        body.append(DECISION)
    head = f"stage ({', '.join(reads)}) => ({', '.join(outputs)})"
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]>\n{head} {{\n' + "\n".join(body) + "\n}")
    serialised: bytes = model.SerializeToString()
    return serialised


def _floats(name: str, values: list[float]) -> str:
    return f"{name} = Constant <value_floats = [{', '.join(f'{value:.4f}' for value in values)}]> ()"
