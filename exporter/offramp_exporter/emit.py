"""A stage's plan -> its ONNX graph, without the decision statistics."""

from collections.abc import Iterable, Mapping
from typing import Final

from offramp_contract.manifest import Exit
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from offramp_exporter.boundary import Crossing
from offramp_exporter.program import Program
from offramp_exporter.sizes import BATCH_SIZE, int64_constant
from offramp_exporter.split import StagePlan

ONE_A_ROW: Final = int64_constant("offramp.one_a_row", [-1, 1])


def stage_graph(
    program: Program,
    plan: StagePlan,
    crossing: Mapping[str, Crossing],
    exit_: Exit | None,
    gate_scores: str | None = None,
) -> ModelProto:
    """Write one stage as a graph of its own.

    Args:
        program: What the plan indexes.
        plan: The stage.
        crossing: How each model input and carry crosses, by the program's name.
        exit_: The exit it ends in, if any; the graph's last output is then `exit_.logits`, float32.
        gate_scores: Name of the output with the scores of the gates that it decides, float32 (B, K), if any.
    """
    reads = [crossing[name] for name in plan.reads]
    emits = [crossing[name] for name in plan.emits]
    names = _boundary_names(program, plan, [*reads, *emits], exit_)
    nodes = [node for one in reads if not one.is_as_promised for node in one.restore()]
    nodes += [program.nodes[i] for i in sorted((*plan.nodes, *plan.support))]
    nodes += [node for one in emits if not one.is_as_promised for node in one.store()]
    scored = [] if gate_scores is None else _gate_scores(program, plan, gate_scores)
    nodes += [*_scores(program, plan, names, exit_), *scored]
    nodes = [*_batch_size(nodes, reads[0]), *(_renamed(node, names) for node in nodes)]
    constants = {tensor.name: tensor for one in (*reads, *emits) for tensor in one.constants()}
    constants |= {ONE_A_ROW.name: ONE_A_ROW} if scored else {}
    graph = helper.make_graph(
        nodes,
        "stage" if exit_ is None else exit_.name,
        [one.info for one in reads],
        [*(one.info for one in emits), *_ends(plan, exit_, gate_scores)],
        _read_by(nodes, {**program.initializers, **constants}),
    )
    return helper.make_model(
        graph,
        producer_name="offramp",
        opset_imports=list(program.opset_imports),
        ir_version=program.ir_version,
    )


def _ends(plan: StagePlan, exit_: Exit | None, gate_scores: str | None) -> list[ValueInfoProto]:
    """Describe the outputs that are no carries."""
    ends = []
    if gate_scores is not None:
        ends.append(helper.make_tensor_value_info(gate_scores, TensorProto.FLOAT, ["batch", len(plan.scored)]))
    if exit_ is not None:
        ends.append(helper.make_tensor_value_info(exit_.logits, TensorProto.FLOAT, ["batch", exit_.num_classes]))
    return ends


def _boundary_names(program: Program, plan: StagePlan, ends: Iterable[Crossing], exit_: Exit | None) -> dict[str, str]:
    """Map the program's names to the graph's: boundary values get their public names, all else keeps its own."""
    names = {one.value: one.tensor.name for one in ends if one.is_as_promised}
    if exit_ is None or plan.scores is None:
        return names
    if plan.scores not in plan.emits and program.dtypes.get(plan.scores) == TensorProto.FLOAT:
        names[plan.scores] = exit_.logits
    return names


def _scores(program: Program, plan: StagePlan, names: Mapping[str, str], exit_: Exit | None) -> list[NodeProto]:
    """Make the output `exit_.logits` where the scores are a carry too, or are no float32."""
    if exit_ is None or plan.scores is None or names.get(plan.scores) == exit_.logits:
        return []
    return [helper.make_node("Cast", [plan.scores], [exit_.logits], to=TensorProto.FLOAT)]


def _gate_scores(program: Program, plan: StagePlan, gate_scores: str) -> list[NodeProto]:
    """Put the scores of the gates that a stage decides side by side, float32, one column each."""
    nodes, columns = [], []
    gates = () if program.gating is None else program.gating.gates
    for score in filter(None, (gates[index].score for index in plan.scored)):
        column = f"{score}.column"
        nodes.append(helper.make_node("Reshape", [score, ONE_A_ROW.name], [f"{column}.as_is"]))
        nodes.append(helper.make_node("Cast", [f"{column}.as_is"], [column], to=TensorProto.FLOAT))
        columns.append(column)
    return [*nodes, helper.make_node("Concat", columns, [gate_scores], axis=1)]


def _batch_size(nodes: Iterable[NodeProto], anchor: Crossing) -> list[NodeProto]:
    """Read the batch size off the stage's first input, if the stage needs it."""
    if not any(BATCH_SIZE in node.input for node in nodes):
        return []
    return [helper.make_node("Shape", [anchor.tensor.name], [BATCH_SIZE], start=0, end=1)]


def _renamed(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    """Copy a node with the graph's names, without what exporters write for debuggers."""
    copy = NodeProto(
        op_type=node.op_type,
        domain=node.domain,
        name=node.name,
        input=[names.get(name, name) for name in node.input],
        output=[names.get(name, name) for name in node.output],
    )
    copy.attribute.extend(node.attribute)
    return copy


def _read_by(nodes: Iterable[NodeProto], initializers: Mapping[str, TensorProto]) -> list[TensorProto]:
    read = dict.fromkeys(name for node in nodes for name in node.input)
    return [initializers[name] for name in read if name in initializers]
