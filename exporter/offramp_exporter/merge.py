"""A bundle without some of its exits: the stages are joined to the program they were cut from, and cut again.

The new bundle is the one that `export` would have written of the network without those exits: heads that nothing else
reads are gone, and so is what crossed the vanished boundaries only. It is proved against the bundle it was made of. Its
model digest is new, so it has no calibration.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from offramp_contract.calibration import Calibration
from offramp_contract.errors import ExportError, ManifestError
from offramp_contract.files import MAX_FILE_BYTES
from offramp_contract.manifest import MANIFEST_FILE, Manifest, Predicate, Provenance, Stage, Tensor
from offramp_contract.policy_spec import without_exits as policy_without_exits
from offramp_contract.statistics import FloatArray
from offramp_runtime import Bundle, Device, StageExecutor, open_bundle, open_device, run_all_exits

from offramp_exporter.batch_range import BatchRange
from offramp_exporter.boundary import crossings
from offramp_exporter.examples import Examples
from offramp_exporter.publish import published
from offramp_exporter.rejoin import rejoin
from offramp_exporter.shared import share
from offramp_exporter.split import split
from offramp_exporter.verify import load, prove_parity, prove_structure
from offramp_exporter.write import write_stages

DROPPED: Final = "dropped_exits"
"""Where the provenance keeps the names of the exits that are gone."""


def merge_exits(
    bundle: Bundle,
    drop: Sequence[int],
    out: str | Path,
    *,
    examples: Mapping[str, np.ndarray] | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Write a bundle that lacks some exits and is proved to answer as before at those that stay.

        merged = merge_exits(open_bundle(Path("bundle")), [0, 2], "bundle-with-fewer-exits")

    Args:
        bundle: What `export` wrote.
        drop: Which exits go, 0-based, at least one; the final exit cannot.
        out: The new bundle's folder, which must not exist yet.
        examples: Inputs to prove it with, by name, the batch on axis 0, besides random ones like them. Integer inputs
            that only take some values need them; None: zeros and ones.
        overwrite: Replace a bundle that is there.

    Returns:
        The new bundle, opened.

    Raises:
        ExportError: If an exit cannot be dropped, `out` exists, or the examples are not what the bundle takes.
        SplitError: If the stages cannot be joined and cut again, naming what stands in the way.
        ParityError: If the new bundle does not answer as the old, naming the tensor.
    """
    merged = without_exits(bundle, drop)
    with published(Path(out), overwrite) as folder:
        prove_merge(bundle, merged, drop, open_device("cpu"), examples)
        for file in merged.manifest.files:
            path = folder / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(merged.read(file))
        (folder / MANIFEST_FILE).write_bytes(merged.manifest.to_bytes())
    return open_bundle(Path(out))


def without_exits(bundle: Bundle, drop: Collection[int]) -> Bundle:
    """Make a bundle that lacks some exits, in memory and not proved.

    Args:
        bundle: What `export` wrote.
        drop: Which exits go, 0-based; the final exit cannot.

    Raises:
        ExportError: If an exit cannot be dropped.
        SplitError: If the stages cannot be joined and cut again, naming what stands in the way.
    """
    old = bundle.manifest
    _check_drop(old, drop)
    program = rejoin(bundle, drop)
    plans = split(program)
    prove_structure(program, plans)
    crossing = crossings(program, plans)
    kept = [exit_ for index, exit_ in enumerate(old.exits) if index not in drop]
    exits = [exit_.model_copy(update={"stage": index}) for index, exit_ in enumerate(kept)]
    stages: list[Stage] = []
    held: dict[str, bytes] = {}
    sharing = share(program, plans)
    for stage, graph in write_stages(program, plans, crossing, exits, sharing):
        name = old.stages[kept[len(stages)].stage].name
        stages.append(stage.model_copy(update={"name": name}))
        held[stage.graph.path] = graph
    shared_weights = sharing.described()
    if shared_weights is not None:
        held[shared_weights.file.path] = sharing.content
    changed = {
        "carries": tuple(one.tensor for name, one in crossing.items() if name not in program.inputs),
        "stages": tuple(stages),
        "exits": tuple(exits),
        "shared_weights": shared_weights,
        "predicates": _predicates(old, drop),
        "default_policy": policy_without_exits(old.default_policy, drop, len(old.exits), old.native),
        "provenance": _provenance(old, drop),
    }
    manifest = Manifest.model_validate({name: getattr(old, name) for name in Manifest.model_fields} | changed)
    written = set(held)
    held |= {file.path: bundle.read(file) for file in manifest.files if file.path not in written}
    return Bundle(manifest, Calibration.bare(manifest), _Held(old.name, held))


def prove_merge(
    bundle: Bundle,
    merged: Bundle,
    drop: Collection[int],
    device: Device,
    examples: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Run a bundle and the one without some of its exits beside each other; see `verify.prove_parity`.

    Raises:
        ParityError: If an exit that stays does not answer as before, naming the tensor.
        ExportError: If the examples are not what the bundle takes.
    """
    executor = StageExecutor(bundle, device)

    def before(inputs: Examples) -> list[FloatArray]:
        answers = run_all_exits(executor, inputs.arrays)
        return [logits_BC for index, (logits_BC, _) in enumerate(answers) if index not in drop]

    manifest = bundle.manifest
    batches = BatchRange(manifest.min_batch, manifest.max_batch).proved
    prove_parity(load(merged, device), before, _examples(manifest, examples), batches)


@dataclass(slots=True)
class _Held:
    """The files of a bundle that is nowhere but in memory."""

    name: str
    held: Mapping[str, bytes]

    def has(self, path: str) -> bool:
        """Tell whether a file is there."""
        return path in self.held

    def read(self, path: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """Give a file."""
        if path not in self.held or len(self.held[path]) > max_bytes:
            raise ManifestError(f"file {path!r} is missing from the bundle {self.name!r}, or too large")
        return self.held[path]


def _check_drop(manifest: Manifest, drop: Collection[int]) -> None:
    final = len(manifest.exits) - 1
    if manifest.gates:
        raise ExportError(f"bundle {manifest.name!r} has gated stages, whose exits cannot be dropped")
    if not final:
        raise ExportError(f"bundle {manifest.name!r} has one exit only, the final one, which stays")
    if not drop or not all(0 <= index < final for index in drop):
        raise ExportError(
            f"drop: name at least one of the exits 0 to {final - 1}; the final exit {final} stays; got {list(drop)}"
        )


def _predicates(manifest: Manifest, drop: Collection[int]) -> tuple[Predicate, ...]:
    """Forget what was answered on the way to the exits that are gone."""
    gone = {manifest.exits[index].name for index in drop}
    return tuple(
        predicate.model_copy(
            update={"answers": {name: answer for name, answer in predicate.answers.items() if name not in gone}}
        )
        for predicate in manifest.predicates
    )


def _provenance(manifest: Manifest, drop: Collection[int]) -> Provenance:
    """Note what is gone; how many parameters went with it is not known."""
    old = manifest.provenance
    before = old.training.get(DROPPED, [])
    gone = [exit_.name for index, exit_ in enumerate(manifest.exits) if index in drop]
    training = old.training | {DROPPED: [*before, *gone]}
    return old.model_copy(update={"training": training, "parameters": None})


def _examples(manifest: Manifest, given: Mapping[str, np.ndarray] | None) -> Examples:
    if given is None:
        return Examples({tensor.name: _example(tensor) for tensor in manifest.inputs})
    wanted = {tensor.name: (tensor.dtype, tensor.shape) for tensor in manifest.inputs}
    got = {name: (str(array.dtype), array.shape[1:]) for name, array in given.items()}
    if got != wanted or len({len(array) for array in given.values()}) != 1 or not all(map(len, given.values())):
        spelled = ", ".join(f"{name} {dtype} (rows, {str(shape)[1:-1]})" for name, (dtype, shape) in wanted.items())
        raise ExportError(f"examples: the bundle takes {spelled}, the same number of rows each, at least one")
    return Examples(dict(given))


def _example(tensor: Tensor) -> np.ndarray:
    # Row 0 of zeros and row 1 of ones: random inputs like it have the spread of one, and integers are 0 or 1.
    example = np.zeros((2, *tensor.shape), tensor.dtype)
    example[1] = 1
    return example
