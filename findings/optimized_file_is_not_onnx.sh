#!/usr/bin/env bash
# The file that onnxruntime saves after its own optimization is no valid ONNX for opsets below 17.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source: https://onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html ("offline mode");
# LayerNormalization is in the standard since opset 17, https://onnx.ai/onnx/operators/onnx__LayerNormalization.html;
# https://github.com/microsoft/onnxruntime/pull/12978 (registered in the ONNX domain by mistake), issues/14768
# Expected by most: nodes that the standard does not have get the domain com.microsoft, and the rest is valid ONNX.
# Observed: a layer normalization written out in opset 11 becomes a node LayerNormalization of the standard domain, in
# a file that still declares opset 11. onnxruntime runs it; onnx's checker refuses it, and so do tools that check or
# infer shapes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cd "$work"
ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper


def session(nodes, inputs, outputs, constants=None, opset=17, **config):
    """A CPU session over a small graph; inputs are (name, type, shape)."""
    graph = helper.make_graph(
        nodes,
        "finding",
        [helper.make_tensor_value_info(*entry) for entry in inputs],
        [helper.make_tensor_value_info(*entry) for entry in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    for name, value in config.items():
        options.add_session_config_entry(name.replace("__", "."), value)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


nodes = [
    helper.make_node("ReduceMean", ["x"], ["mean"], axes=[-1]),
    helper.make_node("Sub", ["x", "mean"], ["centred"]),
    helper.make_node("Pow", ["centred", "two"], ["square"]),
    helper.make_node("ReduceMean", ["square"], ["variance"], axes=[-1]),
    helper.make_node("Add", ["variance", "epsilon"], ["positive"]),
    helper.make_node("Sqrt", ["positive"], ["deviation"]),
    helper.make_node("Div", ["centred", "deviation"], ["normal"]),
    helper.make_node("Mul", ["normal", "scale"], ["scaled"]),
    helper.make_node("Add", ["scaled", "bias"], ["y"]),
]
constants = {"two": 2.0, "epsilon": 1e-5, "scale": np.full(4, 2.0), "bias": np.ones(4)}
graph = helper.make_graph(
    nodes,
    "layer_norm",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 4])],
    [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in constants.items()],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7)
onnx.checker.check_model(model, full_check=True)
options = ort.SessionOptions()
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
options.optimized_model_filepath = "optimized.onnx"
options.log_severity_level = 4
before = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
saved = onnx.load("optimized.onnx")
opset = next(entry.version for entry in saved.opset_import if not entry.domain)
print(f"saved, opset {opset}:", [(node.op_type, node.domain or "ai.onnx") for node in saved.graph.node])
after = ort.InferenceSession("optimized.onnx", options, providers=["CPUExecutionProvider"])
x = np.array([[1, 2, 3, 5]], np.float32)
assert np.allclose(before.run(None, {"x": x})[0], after.run(None, {"x": x})[0], atol=1e-6)
try:
    onnx.checker.check_model(saved)
except onnx.checker.ValidationError as error:
    print("checker:", str(error).splitlines()[0])
else:
    raise SystemExit("the saved file is valid: the behaviour is no longer there")
PYTHON
