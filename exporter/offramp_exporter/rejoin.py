"""A bundle's stage graphs -> the one program they were cut from.

What `emit` and `decide` added is taken off again: the decision statistics with their temperatures, the public names of
the scores, and the turning of values that have their batch elsewhere than in front. Carries keep their names and join
the stages; any other name that two graphs use for different things is made different.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Final

import numpy as np
from offramp_contract.errors import SplitError
from offramp_contract.manifest import Exit, Manifest, Stage, Tensor
from offramp_runtime import Bundle, open_device
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from offramp_exporter.program import PROBE_BATCHES, Program, join_shapes, live_nodes, program_of_model
from offramp_exporter.sizes import BATCH_SIZE
from offramp_exporter.values import onnx_dtype

_SUBGRAPHS: Final = (AttributeProto.GRAPH, AttributeProto.GRAPHS)


def rejoin(bundle: Bundle, dropped: Collection[int] = ()) -> Program:
    """Make one program of a bundle.

    Args:
        bundle: What `export` wrote.
        dropped: Exits that the program shall not have, by index; nodes that only they need are gone.

    Raises:
        SplitError: If the stages do not fit into one graph, naming the stage.
    """
    manifest = bundle.manifest
    kept = [exit_ for index, exit_ in enumerate(manifest.exits) if index not in dropped]
    public = {name for exit_ in kept for name in (exit_.logits, exit_.decision, exit_.temperature)}
    joined = _Joined(manifest.tensors, taken={*manifest.tensors, *public})
    shared = bundle.shared_arrays()
    for index, stage in enumerate(manifest.stages):
        exit_ = None if stage.exit is None else manifest.exits[stage.exit]
        graph, _ = shared.fill(bundle.graph(index), stage.name)
        joined.add(ModelProto.FromString(graph), stage, exit_)
    model = helper.make_model(
        helper.make_graph(
            joined.nodes,
            manifest.name,
            [_info(tensor) for tensor in manifest.inputs],
            [],
            list(joined.constants.values()),
            value_info=[_info(tensor) for tensor in manifest.carries],
        ),
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in joined.opsets.items()],
        ir_version=joined.ir_version,
    )
    program = program_of_model(
        model,
        {exit_.name: joined.scores[exit_.name] for exit_ in kept},
        natives={exit_.name: joined.natives[exit_.name] for exit_ in kept if exit_.native is not None},
    )
    return _with_all_shapes(program, model, manifest)


def _with_all_shapes(program: Program, model: ModelProto, manifest: Manifest) -> Program:
    """Find the shapes that do not follow from the graph by running it: torch told them, but stage graphs do not."""
    made = {name for node in model.graph.node for name in node.output if name}
    written = {name for node in program.nodes for name in node.output}
    unknown = sorted(name for name in made & written if None in program.shapes.get(name, (None,)))
    few, many = PROBE_BATCHES
    if not unknown or manifest.min_batch > few or (manifest.max_batch or many) < many:
        return program
    whole = ModelProto.FromString(model.SerializeToString())
    whole.graph.output.extend(ValueInfoProto(name=name) for name in unknown)
    device = open_device("cpu")
    session = device.load(whole.SerializeToString(), "the stages in one")
    values = []
    for batch in PROBE_BATCHES:
        feeds = {tensor.name: np.zeros((batch, *tensor.shape), tensor.dtype) for tensor in manifest.inputs}
        values.append(device.run(session, feeds, (), unknown)[1])
    shapes, dtypes = dict(program.shapes), dict(program.dtypes)
    for name, at_few, at_many in zip(unknown, *values, strict=True):
        shapes[name] = join_shapes(at_few.shape, at_many.shape) or ()
        dtypes[name] = helper.np_dtype_to_tensor_dtype(at_few.dtype)
    return replace(program, shapes=shapes, dtypes=dtypes)


@dataclass(slots=True)
class _Joined:
    """The program as it grows, stage by stage.

    Attributes:
        carries: The bundle's inputs and carries, by name.
        taken: Every name in use, and those that the bundle's boundaries need.
        scores: The value that holds each exit's scores, by the exit's name.
        natives: The value that holds the score of the network's own exit rule, by the exit's name, where it has one.
        support: Constants, and what is computed of them and the batch size alone: several stages may hold a copy.
        maker: The node that makes each value.
        first: What the first stage that makes a value calls it -> its name here.
    """

    carries: Mapping[str, Tensor]
    taken: set[str]
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    opsets: dict[str, int] = field(default_factory=dict)
    ir_version: int = 0
    scores: dict[str, str] = field(default_factory=dict)
    natives: dict[str, str] = field(default_factory=dict)
    support: set[str] = field(default_factory=lambda: {"", BATCH_SIZE})
    maker: dict[str, NodeProto] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, model: ModelProto, stage: Stage, exit_: Exit | None) -> None:
        """Add a stage behind those that are there."""
        _check(model, stage)
        self._agree_on_operators(model, stage)
        names = {name: name for name in ("", *stage.inputs, *stage.outputs)}
        ends = list(stage.outputs)
        if exit_ is not None:
            carried = self._carried_scores(model, stage, exit_)
            self.scores[exit_.name] = names[exit_.logits] = carried or self._fresh(f"{exit_.name}.scores")
            ends += [] if carried else [exit_.logits]
        native = None if exit_ is None or exit_.native is None else _native_score(model, exit_)
        ends += [] if native is None else [native]
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in live_nodes(model.graph.node, ends):
            for name in node.input:
                if name in constants and name not in names:
                    names[name] = self._constant(constants[name])
                elif name not in names:
                    raise SplitError(
                        f"stage {stage.name!r}: its scores or carries depend on {name!r}, which is no carry"
                    )
            self._node(node, names)
        if exit_ is not None and native is not None:
            self.natives[exit_.name] = names[native]

    def _carried_scores(self, model: ModelProto, stage: Stage, exit_: Exit) -> str | None:
        """Give the carry that is an exit's scores: `emit` writes scores that later stages read a second time."""
        last = next((node for node in model.graph.node if exit_.logits in node.output), None)
        if last is None or last.op_type != "Cast" or last.input[0] not in stage.outputs:
            return None
        carry: str = last.input[0]
        return carry if self.carries[carry].dtype == "float32" else None

    def _node(self, node: NodeProto, names: dict[str, str]) -> None:
        """Add a node, unless what it makes is there already."""
        if BATCH_SIZE in node.output and BATCH_SIZE in self.maker:
            names[BATCH_SIZE] = BATCH_SIZE
            return
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [names[name] for name in node.input]
        same = self._same(copy)
        if same is not None:
            names.update(zip(node.output, same, strict=True))
            return
        names.update((name, self._fresh(name)) for name in node.output if name not in names)
        copy.output[:] = [names[name] for name in node.output]
        if self.support.issuperset(copy.input):
            self.support.update(copy.output)
        self.maker.update(dict.fromkeys(copy.output, copy))
        for name in node.output:
            self.first.setdefault(name, names[name])
        self.nodes.append(copy)

    def _same(self, node: NodeProto) -> list[str] | None:
        """Give the values of an earlier stage that are what a node makes, known by the name that both stages use."""
        value = self.first.get(node.output[0], "")
        earlier = self.maker.get(value)
        if earlier is None:
            return None
        if self.support.issuperset(node.input) and _do_the_same(earlier, node):
            return list(earlier.output)
        return [value] if self._is_turned_back(node, value) else None

    def _is_turned_back(self, node: NodeProto, value: str) -> bool:
        """Tell whether a node ends the way of a value over a boundary, as `Crossing` makes it: turned, turned back."""
        way = [node]
        while len(way) < 4 and way[-1].input[0] in self.maker:
            way.append(self.maker[way[-1].input[0]])
        if [step.op_type for step in way] != ["Reshape", "Transpose", "Transpose", "Reshape"]:
            return False
        there, back = (list(step.attribute[0].ints) for step in (way[2], way[1]))
        return way[3].input[0] == value and [there[axis] for axis in back] == sorted(there)

    def _constant(self, tensor: TensorProto) -> str:
        """Keep a constant, once if stages hold the same under one name; gives its name."""
        held = self.constants.get(tensor.name)
        if held is not None and held == tensor:
            return held.name
        copy = TensorProto()
        copy.CopyFrom(tensor)
        copy.name = self._fresh(tensor.name)
        self.constants[copy.name] = copy
        self.support.add(copy.name)
        return copy.name

    def _fresh(self, name: str) -> str:
        free = next(one for one in _numbered(name) if one not in self.taken)
        self.taken.add(free)
        return free

    def _agree_on_operators(self, model: ModelProto, stage: Stage) -> None:
        self.ir_version = max(self.ir_version, model.ir_version)
        for entry in model.opset_import:
            domain = "" if entry.domain == "ai.onnx" else entry.domain
            if self.opsets.setdefault(domain, entry.version) != entry.version:
                raise SplitError(
                    f"stage {stage.name!r} is written in another version of {domain or 'ONNX'}'s operators"
                )


def _check(model: ModelProto, stage: Stage) -> None:
    is_plain = not model.functions and not model.graph.sparse_initializer
    if not is_plain or any(held.type in _SUBGRAPHS for node in model.graph.node for held in node.attribute):
        raise SplitError(f"stage {stage.name!r} holds functions, branches or loops, which cannot be joined with others")


def _native_score(model: ModelProto, exit_: Exit) -> str:
    """Give the value that `decide` put last into an exit's decision."""
    decision = next(node for node in model.graph.node if exit_.decision in node.output)
    return str(decision.input[-1])


def _do_the_same(one: NodeProto, other: NodeProto) -> bool:
    """Tell whether two nodes compute the same of the same values."""
    kinds = [(node.op_type, node.domain, list(node.input), len(node.output)) for node in (one, other)]
    return kinds[0] == kinds[1] and list(one.attribute) == list(other.attribute)


def _numbered(name: str) -> Iterator[str]:
    yield name
    for number in count(2):
        yield f"{name}_{number}"


def _info(tensor: Tensor) -> ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, onnx_dtype(tensor.dtype), ["batch", *tensor.shape])
