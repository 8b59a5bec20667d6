"""`offramp export`: a trained network, or a multi-exit ONNX file, becomes a proved bundle."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from offramp_cli.console import stderr, stdout
from offramp_cli.errors import CommandError
from offramp_cli.explained import print_explanation
from offramp_cli.export_source import (
    arrays_of,
    describe,
    read_default_policy,
    read_inputs,
    read_module,
    read_proof_inputs,
)

if TYPE_CHECKING:
    from offramp_contract.manifest import Manifest


def export(
    target: Annotated[
        str, typer.Argument(help="package.module:factory, one of `offramp models`, or a multi-exit model.onnx.")
    ],
    *,
    out: Annotated[Path | None, typer.Option(help="The bundle's folder; it must not exist yet.")] = None,
    weights: Annotated[Path | None, typer.Option(help="A state_dict that torch.save wrote.")] = None,
    example: Annotated[
        list[str] | None,
        typer.Option(help="Shape of one row: 3x32x32, or by input ids=128:int64. Once for every input."),
    ] = None,
    exits: Annotated[
        str | None,
        typer.Option(
            help="Which returned tensors (or tensors of the ONNX file) are exits, in order of depth: out[0],out[1]; "
            "early=out[0],late=out[1] also names them; out.logits[:], out[:][0], stack(out, dim=1), self.early.scores, "
            "log(out[1]) for probabilities, final-first. Unset: every float tensor of shape (batch, classes)."
        ),
    ] = None,
    gates: Annotated[
        str | None,
        typer.Option(
            help="Which returned tensors are decisions of gates, 0 or 1 for each row, written as exits are: out[1]. "
            "Those that the gate operator makes are found without it."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in the server; unset: after the class.")] = None,
    labels: Annotated[Path | None, typer.Option(help="A text file with a class name on each line.")] = None,
    preprocessing: Annotated[
        Path | None, typer.Option(help="How images or texts become inputs: the manifest's JSON object.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="The tokenizer.json of a text preprocessing.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Take example, labels and preprocessing from this data set of `offramp models`.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the data set's files; unset: that of OFFRAMP_DATA, else they are downloaded once."
        ),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Policy of requests that name none: a kind, or the JSON of a policy.")
    ] = None,
    training: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file to keep in the manifest's provenance; the one that `offramp train` writes also says how "
            "the network was built and with which policy it is to serve."
        ),
    ] = None,
    proof_inputs: Annotated[
        Path | None,
        typer.Option(
            help="Real inputs to prove the bundle on: an .npy file, or an .npz with an array per input; unset: the "
            "data set's calibration images."
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="fp32, or fp16: weights and values in float16, proved against the network at a wider tolerance; "
            "inputs, logits and decisions stay float32."
        ),
    ] = "fp32",
    overwrite: Annotated[bool, typer.Option(help="Replace a bundle that is there.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print what is understood of the network, and write nothing.")
    ] = False,
) -> None:
    """Cut a network into stages, prove that they equal it, and write the bundle; or write nothing and say why."""
    from offramp_exporter import explain as explain_module
    from offramp_exporter import explain_onnx, export_onnx
    from offramp_exporter import export as export_module
    from offramp_exporter.exit_paths import parse_exits

    if precision not in ("fp32", "fp16"):
        raise CommandError(f"--precision: {precision!r} is neither fp32 nor fp16")
    described = describe(data, data_dir, labels, preprocessing, training)
    inputs = read_inputs(example or [], described.data)
    wanted = None if exits is None else parse_exits(exits)
    decided = None if gates is None else parse_exits(gates)
    default_policy = read_default_policy(policy, described.training)
    is_file = target.endswith(".onnx")
    if is_file and wanted is None:
        raise CommandError("an ONNX file needs --exits: the names of the tensors that hold the exits' logits")
    if is_file and gates is not None:
        raise CommandError("an ONNX file has no gates that could be named; leave --gates out")
    if is_file and weights is not None:
        raise CommandError("an ONNX file holds its own weights; leave --weights out")
    if inputs is None and not is_file:
        raise CommandError("a network needs --example, the shape of one row such as 3x32x32, or --data")
    if not explain and out is None:
        raise CommandError("name the bundle's folder with --out, or ask for --explain, which writes nothing")
    example_inputs = {} if inputs is None else inputs
    if explain or out is None:
        understood: dict[str, Any] = {"exits": wanted, "default_policy": default_policy}
        if is_file:
            print_explanation(explain_onnx(target, example_inputs=arrays_of(inputs), **understood))
        else:
            module = read_module(target, weights, described)
            understood |= {"gates": decided, "labels": described.labels}
            print_explanation(explain_module(module, example_inputs, **understood))
        return
    proof = read_proof_inputs(proof_inputs, described.data)
    options: dict[str, Any] = {
        "exits": wanted,
        "name": name,
        "labels": described.labels,
        "preprocessing": described.preprocessing,
        "tokenizer": tokenizer,
        "default_policy": default_policy,
        "training": described.training,
        "precision": precision,
        "overwrite": overwrite,
    }
    with step_by_step() as step:
        if is_file:
            arrays = arrays_of(inputs)
            bundle = export_onnx(target, out=out, example_inputs=arrays, proof_inputs=proof, progress=step, **options)
        else:
            module = read_module(target, weights, described)
            options |= {"gates": decided, "progress": step}
            bundle = export_module(module, example_inputs, out, proof_inputs=proof, **options)
    print_stages(bundle.manifest)
    print_proof(bundle.manifest)
    stdout.print(f"\nbundle: {out}   serve it:  offramp serve {out}", soft_wrap=True, highlight=False)


@contextmanager
def step_by_step() -> Iterator[Any]:
    """Give a function that shows the step that is under way and ticks off the one before."""
    under_way: list[str] = []
    with stderr.status("starting") as status:

        def step(sentence: str) -> None:
            if under_way:
                stderr.print(f"[green]✓[/] {under_way.pop()}", highlight=False)
            under_way.append(escape(sentence))  # it may quote code, whose brackets are no markup
            status.update(under_way[-1])

        yield step
        if under_way:
            stderr.print(f"[green]✓[/] {under_way.pop()}", highlight=False)


def print_stages(manifest: "Manifest") -> None:
    """Print what the bundle's stages cost and what crosses their boundaries."""
    table = Table("stage", "exit", box=None, pad_edge=False)
    if manifest.gates:
        table.add_column("behind gates")
        table.add_column("scores")
    table.add_column("FLOPs", justify="right")
    table.add_column("depth", justify="right")
    table.add_column("emits")
    table.add_column("carried per row", justify="right")
    depths = manifest.exit_depths
    for stage, scored in zip(manifest.stages, manifest.scored_gates, strict=True):
        exit_name = "" if stage.exit is None else manifest.exits[stage.exit].name
        depth = "" if stage.exit is None else f"{depths[stage.exit]:.1%}"
        carried = f"{stage.carry_bytes:,} bytes" if stage.carry_bytes else ""
        gates = [", ".join(manifest.gates[gate].name for gate in kind) for kind in (stage.gates, scored)]
        cells = (*(gates if manifest.gates else ()), f"{stage.flops:,}", depth, ", ".join(stage.outputs), carried)
        table.add_row(stage.name, exit_name, *map(escape, cells))
    stdout.print(table)
    routes = ", for all patterns of its gates that were tried" if manifest.gates else ""
    proof = manifest.provenance.proof
    within = "1e-4" if proof is None or proof.tolerance is None else f"{proof.tolerance:.0e}".replace("e-0", "e-")
    stdout.print(
        f"\n{manifest.name} {manifest.model_digest[:12]}: {len(manifest.exits)} exits equal the network's on every "
        f"batch size tried{routes}, within {within} + {within}·|logit|",
        soft_wrap=True,
        highlight=False,
    )


def print_proof(manifest: "Manifest") -> None:
    """Print on how many inputs a bundle was proved, and what none of them did."""
    proof = manifest.provenance.proof
    if proof is None:
        return
    is_seen = manifest.native is not None and not proof.unreached
    seen = ", which together take every exit and get every answer" if is_seen else ""
    stdout.print(f"and on {proof.num_inputs} varied inputs{seen}", soft_wrap=True, highlight=False)
    for sentence in proof.unreached:
        stdout.print(f"not proved: {escape(sentence)}", soft_wrap=True, highlight=False)
