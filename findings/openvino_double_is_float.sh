#!/usr/bin/env bash
# OpenVINO computes float64 tensors in float32 and labels the answers float64: 1e300 comes back as 3.4e38.
#
# Versions: openvino 2026.4.1 (CPU), onnxruntime 1.32.0 as the control, onnx 1.23.2.
# Source: https://onnx.ai/onnx/operators/onnx__Add.html (float64 is among its types).
# Expected by most: a float64 model keeps 15 digits; or the runtime refuses the type, as it refuses complex numbers.
# Observed: 1 + 1e-9 is 1, 2**24 + 1 is 2**24, and 1e300 is float32's greatest number, which is finite,
# so that a check for infinity passes. Nothing is logged. Models with positions, times or sums in float64 lose them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 \
    openvino==2026.4.1
cd "$work"
ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnxruntime as ort
import openvino
from onnx import TensorProto, helper, numpy_helper

graph = helper.make_graph(
    [helper.make_node("Add", ["x", "small"], ["y"])],
    "finding",
    [helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["n"])],
    [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)],
    [numpy_helper.from_array(np.array(1e-9), "small")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
numbers = np.array([1.0, 2.0**24 + 1, 1e300])
control = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": numbers})[0]
core = openvino.Core()
compiled = core.compile_model(core.read_model(model), "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})
found = np.array(compiled({"x": numbers})[0])
print("numbers + 1e-9, onnxruntime:", control.tolist(), control.dtype)
print("numbers + 1e-9, OpenVINO:   ", found.tolist(), found.dtype, "though its mode is ACCURACY")
assert np.array_equal(control, numbers + 1e-9)
assert found.dtype == np.float64
if np.array_equal(found, control):
    raise SystemExit("float64 is computed in float64: the behaviour is no longer there")
assert found[0] == 1.0
assert found[1] == 2.0**24
assert found[2] == np.finfo(np.float32).max
PYTHON
