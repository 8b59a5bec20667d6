"""Whether the parts of a manifest fit together: what pydantic's field types cannot say.

Each check yields sentences that name the stage, exit or tensor at fault; a later one may rely on what an earlier one
would have refused.
"""

import math
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import TYPE_CHECKING

from offramp_contract.errors import InvalidValue
from offramp_contract.policy_spec import compares_labels, compile_policy

if TYPE_CHECKING:
    from offramp_contract.manifest import Manifest


def first_problem(manifest: "Manifest") -> str | None:
    """Give the first thing that contradicts itself in a manifest, as a sentence, or None if all fits."""
    checks = (
        _tensor_problems,
        _weight_problems,
        _exit_problems,
        _gate_problems,
        _preprocessing_problems,
        _policy_problems,
    )
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


def _weight_problems(manifest: "Manifest") -> Iterator[str]:
    if manifest.shared_weights is None:
        return
    tensors = sorted(manifest.shared_weights.tensors, key=lambda tensor: tensor.offset)
    if len({tensor.name for tensor in tensors}) != len(tensors):
        yield "two shared weights have the same name"
    for tensor, following in pairwise(tensors):
        if tensor.offset + tensor.num_bytes > following.offset:
            yield f"shared weights {tensor.name!r} and {following.name!r} overlap"


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
    num_native = sum(exit_.native is not None for exit_ in manifest.exits[:-1])
    if num_native not in (0, len(manifest.exits) - 1) or manifest.exits[-1].native is not None:
        yield "every exit but the final one has a native rule, or none has"
    if manifest.labels is not None and any(e.num_classes != len(manifest.labels) for e in manifest.exits):
        yield f"{len(manifest.labels)} labels do not fit the exits' number of classes"


def _gate_problems(manifest: "Manifest") -> Iterator[str]:
    if len({gate.name for gate in manifest.gates}) != len(manifest.gates):
        yield "two gates have the same name"
    for gate in manifest.gates:
        if (gate.stage is None) == (gate.priority is None):
            yield f"gate {gate.name!r} needs either a stage that scores it or a priority"
        if gate.stage is not None and gate.stage >= len(manifest.stages):
            yield f"gate {gate.name!r} names stage {gate.stage}, which is not there"
    for stage, scored in zip(manifest.stages, manifest.scored_gates, strict=True):
        if bool(scored) != (stage.scores is not None):
            yield f"stage {stage.name!r} and the gates do not agree on whether it scores any"
    for index, stage in enumerate(manifest.stages):
        yield from _gated_stage_problems(manifest, index)
        if stage.gates and stage.exit is not None:
            yield f"stage {stage.name!r} is gated and ends in an exit, which every row must be able to reach"
    for index in range(len(manifest.stages)):
        yield from _merge_problems(manifest, index)
    for index, gate in enumerate(manifest.gates):
        if not any(index in stage.gates for stage in manifest.stages):
            yield f"gate {gate.name!r} decides over no stage"


def _gated_stage_problems(manifest: "Manifest", index: int) -> Iterator[str]:
    stage = manifest.stages[index]
    for number in stage.gates:
        gate = manifest.gates[number] if number < len(manifest.gates) else None
        if gate is None or (gate.stage is not None and gate.stage >= index):
            yield f"stage {stage.name!r} names gate {number}, which no earlier stage scores"
        elif gate.stage is not None and not set(manifest.stages[gate.stage].gates) <= set(stage.gates):
            yield f"stage {stage.name!r} is behind gate {gate.name!r}, but not behind the gates that one is behind"


def _merge_problems(manifest: "Manifest", index: int) -> Iterator[str]:
    stage, tensors = manifest.stages[index], manifest.tensors
    if stage.merges and not stage.gates:
        yield f"stage {stage.name!r} has merges but no gate"
    before = chain(
        (tensor.name for tensor in manifest.inputs), *(earlier.outputs for earlier in manifest.stages[:index])
    )
    known = set(before)
    for merge in stage.merges:
        run, skip = tensors.get(merge.run), tensors.get(merge.skip)
        if run is None or merge.run not in stage.outputs:
            yield f"stage {stage.name!r} merges {merge.run!r}, which is not among its outputs"
        elif skip is None or merge.skip not in known:
            yield f"stage {stage.name!r} merges with {merge.skip!r}, which no earlier stage writes"
        elif (run.dtype, run.shape) != (skip.dtype, skip.shape):
            yield f"stage {stage.name!r} merges {merge.run!r} with {merge.skip!r}, which has another shape or dtype"
    merged = {merge.run for merge in stage.merges}
    for later in manifest.stages[index + 1 :]:
        if set(stage.gates) <= set(later.gates):
            continue
        for name in (set(later.inputs) | {merge.skip for merge in later.merges}) & set(stage.outputs) - merged:
            yield f"stage {later.name!r} reads {name!r}, which nothing stands for where {stage.name!r} does not run"


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
        compile_policy(manifest.default_policy, len(manifest.exits), manifest.native)
    except InvalidValue as error:
        yield f"default_policy: {error.message}"
    if compares_labels(manifest.default_policy) and not manifest.has_common_classes:
        yield "default_policy: patience and agreement compare labels, and the exits have different numbers of classes"
