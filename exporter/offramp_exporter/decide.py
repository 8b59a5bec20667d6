"""Puts the decision statistics into a stage graph.

What leaves the accelerator is then a few numbers a row. The graph computes what `offramp_contract.statistics` defines,
in float32, and stays exact where probabilities round to 0 and 1: the odds against the leading class are summed over the
other classes, relative to the runner-up, and never taken as 1 - p.
"""

import math

import numpy as np
from offramp_contract.manifest import Exit
from offramp_contract.statistics import decision_width, num_top
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

_RULE = """
decision (float[batch, classes] logits, float temperature) => (float[batch, width] decision) {
  top_logit, top_class = TopK <axis = 1> (logits, num_top)
  leading_logit = Slice (top_logit, at_0, at_1, axis_1)
  leading_class = Slice (top_class, at_0, at_1, axis_1)
  second_logit = Slice (top_logit, at_1, at_2, axis_1)
  second_is_masked = Less (second_logit, lowest)
  runner_up_logit = Where (second_is_masked, lowest, second_logit)

  gap = Sub (leading_logit, runner_up_logit)
  lead = Div (gap, temperature)
  minus_lead = Neg (lead)
  runner_up_odds = Exp (minus_lead)

  above_runner_up = Sub (logits, runner_up_logit)
  scaled = Div (above_runner_up, temperature)
  relative = Exp (scaled)
  is_leading = Equal (class_index, leading_class)
  others = Where (is_leading, zero, relative)
  sum_others = ReduceSum <keepdims = 1> (others, axis_1)
  log_others = Log (sum_others)
  log_odds = Sub (lead, log_others)

  odds = Mul (others, runner_up_odds)
  odds_against = Mul (sum_others, runner_up_odds)
  total = Add (odds_against, one)
  behind_leader = Sub (scaled, lead)
  counts = Greater (odds, zero)
  finite_behind = Where (counts, behind_leader, zero)
  surprise = Mul (odds, finite_behind)
  sum_surprise = ReduceSum <keepdims = 1> (surprise, axis_1)
  mean_surprise = Div (sum_surprise, total)
  log_total = Log (total)
  nats = Sub (log_total, mean_surprise)
  share = Div (nats, log_classes)
  is_rounded_up = Greater (share, one)
  entropy = Where (is_rounded_up, one, share)

  top_behind = Sub (top_logit, leading_logit)
  top_scaled = Div (top_behind, temperature)
  top_odds = Exp (top_scaled)
  top_probability = Div (top_odds, total)
  leading_probability = Slice (top_probability, at_0, at_1, axis_1)
  second_probability = Slice (top_probability, at_1, at_2, axis_1)
  margin = Sub (leading_probability, second_probability)

  top_class_number = Cast <to = 1> (top_class)
  decision = Concat <axis = 1> (log_odds, entropy, margin, top_probability, top_class_number)
}
"""
_PREFIX = "offramp."
"""Of the rule's own names in every stage graph: a short one, because it is written some 150 times."""

# NaN: comparisons with it are false, so every `Where` above lets it through, and any NaN logit reaches `sum_others`.


def add_decision(model: ModelProto, exit_: Exit, native: str | None = None) -> None:
    """Extend a stage graph by the output `exit_.decision` and the scalar input `exit_.temperature`, in place.

    Args:
        model: A stage graph with the output `exit_.logits`, float32 (B, C).
        exit_: The exit, whose names are used.
        native: The graph's value that holds the score of the network's own rule, float32 (B, 1); a last column.
    """
    rule = parser.parse_graph(_RULE)
    public = {"logits": exit_.logits, "temperature": exit_.temperature, "decision": exit_.decision}
    for node in rule.node:
        for names in (node.input, node.output):
            names[:] = [public.get(name, f"{_PREFIX}{name}") for name in names]
    if native is not None:
        rule.node[-1].input.append(native)
    graph = model.graph
    graph.node.extend(rule.node)
    graph.initializer.extend(_constants(exit_))
    graph.input.append(helper.make_tensor_value_info(exit_.temperature, TensorProto.FLOAT, []))
    width = decision_width(exit_.num_classes, native is not None)
    graph.output.append(helper.make_tensor_value_info(exit_.decision, TensorProto.FLOAT, ["batch", width]))


def _constants(exit_: Exit) -> list[TensorProto]:
    values: dict[str, np.ndarray] = {
        "num_top": np.array([num_top(exit_.num_classes)], dtype=np.int64),
        "at_0": np.array([0], dtype=np.int64),
        "at_1": np.array([1], dtype=np.int64),
        "at_2": np.array([2], dtype=np.int64),
        "axis_1": np.array([1], dtype=np.int64),
        "class_index": np.arange(exit_.num_classes, dtype=np.int64)[None],
        "zero": np.array(0, dtype=np.float32),
        "one": np.array(1, dtype=np.float32),
        "lowest": np.array(np.finfo(np.float32).min, dtype=np.float32),
        "log_classes": np.array(math.log(exit_.num_classes), dtype=np.float32),
    }
    return [numpy_helper.from_array(value, f"{_PREFIX}{name}") for name, value in values.items()]
