#!/usr/bin/env bash
# onnx's inliner fails on an operator whose optional input in the middle is left out.
#
# Versions: onnx 1.23.2.
# Source: onnx.inliner.inline_selected_functions with inline_schema_functions=True; ONNX IR, "Optional Inputs and
# Outputs": an empty name leaves an input out.
# Expected by most: the operator is replaced by its definition, as with all inputs connected.
# Observed: "Type unknown for", followed by the empty name. The same node with the input connected is inlined. A tool
# that lowers new operators by their definitions must treat such nodes in another way.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import onnx
import onnx.inliner
from onnx import TensorProto, helper


def inlined(names):
    """Return the operators of a CausalConvWithState after inlining; `names` are its inputs."""
    shapes = {"x": ["batch", 4, "seq"], "w": [4, 1, 3], "b": [4], "past": ["batch", 4, 2]}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in names if name]
    node = helper.make_node("CausalConvWithState", names, ["y", "state"])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, "seq"])
    graph = helper.make_graph([node], "finding", values, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 27)], ir_version=13)
    onnx.checker.check_model(model, full_check=True)
    model = onnx.shape_inference.infer_shapes(model)
    chosen = [("", "CausalConvWithState")]
    found = onnx.inliner.inline_selected_functions(model, chosen, inline_schema_functions=True)
    return [node.op_type for node in found.graph.node]


print("all inputs:", inlined(["x", "w", "b", "past"])[:4], "...")
try:
    inlined(["x", "w", "", "past"])
except RuntimeError as fault:
    print("without the bias:", " ".join(str(fault).split())[-60:])
    assert "Type unknown" in str(fault), str(fault)
else:
    raise SystemExit("the node is inlined: the behaviour is no longer there")
PYTHON
