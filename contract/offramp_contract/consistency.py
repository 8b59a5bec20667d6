"""Whether the parts of a manifest fit together: what pydantic's field types cannot say.

Each check yields sentences that name the stage, exit or tensor at fault; a later one may rely on what an earlier one
would have refused.
"""

import math
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from offramp_contract.errors import InvalidValue
from offramp_contract.policy_spec import compile_policy

if TYPE_CHECKING:
    from offramp_contract.manifest import Manifest


def first_problem(manifest: "Manifest") -> str | None:
    """Give the first thing that contradicts itself in a manifest, as a sentence, or None if all fits."""
    checks = (_tensor_problems, _exit_problems, _gate_problems, _preprocessing_problems, _policy_problems)
    return next(chain.from_iterable(check(manifest) for check in checks), None)


def _tensor_problems(manifest: "Manifest") -> Iterator[str]:
    names = [tensor.name for tensor in (*manifest.inputs, *manifest.carries)]
    if len(set(names)) != len(names):
        yield "two inputs or carries have the same name"
    if len({stage.name for stage in manifest.stages}) != len(manifest.stages):
        yield "two stages have the same name"
    if manifest.max_batch is not None and manifest.min_batch > manifest.max_batch:
        yield f"min_batch {manifest.min_batch} is above max_batch {manifest.max_batch}"
    known = {tensor.name for tensor in manifest.inputs}
    declared = {tensor.name for tensor in manifest.carries}
    for stage in manifest.stages:
        for name in stage.inputs:
            if name not in known:
                yield f"stage {stage.name!r} reads {name!r}, which no earlier stage writes"
        for name in stage.outputs:
            if name not in declared:
                yield f"stage {stage.name!r} writes {name!r}, which is not among the carries"
            elif name in known:
                yield f"stage {stage.name!r} writes {name!r}, which an earlier stage writes too"
        known.update(stage.outputs)


def _exit_problems(manifest: "Manifest") -> Iterator[str]:
    stated = [(i, stage.exit) for i, stage in enumerate(manifest.stages) if stage.exit is not None]
    expected = [(exit_.stage, i) for i, exit_ in enumerate(manifest.exits)]
    if stated != expected:
        yield "stages and exits do not name each other, in order"
    if manifest.exits[-1].stage != len(manifest.stages) - 1:
        yield "the last stage does not end in the final exit"
    if len({exit_.name for exit_ in manifest.exits}) != len(manifest.exits):
        yield "two exits have the same name"
    for exit_ in manifest.exits:
        stage = manifest.stages[exit_.stage]
        ends = [*stage.outputs, exit_.logits, exit_.decision, *((exit_.halting,) if exit_.halting else ())]
        if len(set(ends)) != len(ends) or exit_.temperature in stage.inputs:
            yield f"exit {exit_.name!r} gives one name to two tensors of its stage"
    if manifest.labels is not None and any(e.num_classes != len(manifest.labels) for e in manifest.exits):
        yield f"{len(manifest.labels)} labels do not fit the exits' number of classes"


def _gate_problems(manifest: "Manifest") -> Iterator[str]:
    tensors = manifest.tensors
    known = {tensor.name for tensor in manifest.inputs}
    for index, stage in enumerate(manifest.stages):
        for merge in stage.merges:
            run, skip = tensors.get(merge.run), tensors.get(merge.skip)
            if skip is None or skip.name not in known:
                yield f"stage {stage.name!r} merges with {merge.skip!r}, which no earlier stage writes"
            elif run is not None and (run.dtype, run.shape) != (skip.dtype, skip.shape):
                yield f"stage {stage.name!r} merges {merge.run!r} with {merge.skip!r}, which has another shape or dtype"
        known.update(stage.outputs)
        if stage.gate is None:
            if stage.merges:
                yield f"stage {stage.name!r} has merges but no gate"
            continue
        if stage.gate >= len(manifest.gates) or manifest.gates[stage.gate].stage >= index:
            yield f"stage {stage.name!r} names gate {stage.gate}, which no earlier stage scores"
        if {merge.run for merge in stage.merges} != set(stage.outputs):
            yield f"stage {stage.name!r} is gated, but its merges do not cover its outputs"


def _preprocessing_problems(manifest: "Manifest") -> Iterator[str]:
    spec = manifest.preprocessing
    if spec is None:
        return
    if spec.kind == "image":
        made = (len(spec.mode), spec.height, spec.width)
        if len(manifest.inputs) != 1 or math.prod(manifest.inputs[0].shape) != math.prod(made):
            yield f"preprocessing makes one image of shape {list(made)}, which is not what the model reads"
        return
    made_names = {spec.ids, spec.mask} - {None}
    if {tensor.name for tensor in manifest.inputs} != made_names:
        yield f"preprocessing makes {sorted(filter(None, made_names))}, which are not the model's inputs"
    for tensor in manifest.inputs:
        if tensor.shape != (spec.length,):
            yield f"preprocessing makes {spec.length} tokens, but input {tensor.name!r} has shape {list(tensor.shape)}"


def _policy_problems(manifest: "Manifest") -> Iterator[str]:
    try:
        compile_policy(manifest.default_policy, len(manifest.exits))
    except InvalidValue as error:
        yield f"default_policy: {error.message}"
