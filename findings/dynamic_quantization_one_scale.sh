#!/usr/bin/env bash
# In a model of quantize_dynamic, one large number anywhere in the batch turns the answers of other rows to zero.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source: https://onnx.ai/onnx/operators/onnx__DynamicQuantizeLinear.html: scale and zero point are scalars.
# Expected by most: "dynamic" quantization takes a scale for each token, as the int8 schemes for language models do,
# and the fused kernel could only be finer than the graph.
# Observed: one scale for the whole tensor, batch and sequence included. At load the three nodes become one
# DynamicQuantizeMatMul, which also takes one scale. Beside a row with one value of 1000, a row of ones becomes zeros.
# Padding of zeros is harmless, because the range includes 0.
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


from onnxruntime.quantization import quantize_dynamic

graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "w"], ["y"], name="identity")],
    "identity",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "sequence", 4])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", 4])],
    [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")],
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "float.onnx")
quantize_dynamic("float.onnx", "int8.onnx")
options = ort.SessionOptions()
options.log_severity_level = 4
options.optimized_model_filepath = "loaded.onnx"
run = ort.InferenceSession("int8.onnx", options, providers=["CPUExecutionProvider"])
fused = [node.op_type for node in onnx.load("loaded.onnx").graph.node]
ones = np.ones((1, 2, 4), np.float32)
loud = ones.copy()
loud[0, 0, 0] = 1000
alone = run.run(None, {"x": ones})[0][0]
beside = run.run(None, {"x": np.concatenate([ones, loud])})[0][0]
padded = run.run(None, {"x": np.pad(ones, ((0, 0), (0, 3), (0, 0)))})[0][0, :2]
print(f"loaded as {fused}: alone {alone[0]}, beside a value of 1000 {beside[0]}, padded with zeros {padded[0]}")
assert fused == ["DynamicQuantizeMatMul"]
assert np.allclose(alone, 1) and np.allclose(padded, 1) and not beside.any()
PYTHON
