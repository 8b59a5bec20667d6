"""The small graph that puts survivors of several batches together in device memory."""

from onnx import TensorProto, helper

FLOAT32 = int(TensorProto.FLOAT)


def gather_graph(element_type: int, num_sources: int) -> bytes:
    """Build a graph that gathers rows of several tensors of any one shape.

    Inputs: `source_i` of any rank with the batch first, `rows_i` int64 (the rows taken from it), and `order` int64,
    which permutes all taken rows. Output: `gathered`.

    Args:
        element_type: ONNX element type of the sources.
        num_sources: How many there are.
    """
    int64 = TensorProto.INT64
    inputs = [helper.make_tensor_value_info(f"source_{i}", element_type, None) for i in range(num_sources)]
    inputs += [helper.make_tensor_value_info(f"rows_{i}", int64, ["taken"]) for i in range(num_sources)]
    inputs.append(helper.make_tensor_value_info("order", int64, ["all_taken"]))
    picked = [f"picked_{i}" for i in range(num_sources)]
    nodes = [helper.make_node("Gather", [f"source_{i}", f"rows_{i}"], [picked[i]], axis=0) for i in range(num_sources)]
    nodes.append(helper.make_node("Concat", picked, ["together"], axis=0))
    nodes.append(helper.make_node("Gather", ["together", "order"], ["gathered"], axis=0))
    output = helper.make_tensor_value_info("gathered", element_type, None)
    graph = helper.make_graph(nodes, "gather", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())
