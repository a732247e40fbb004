#!/usr/bin/env bash
# A float MatMul with int8 weights behind DequantizeLinear rounds its activations too, though the file has float ones.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2, x86-64.
# Source: session.qdq_matmulnbits_accuracy_level in
# https://github.com/microsoft/onnxruntime/blob/main/include/onnxruntime/core/session/onnxruntime_session_options_config_keys.h
# Expected by most: weight-only quantization costs the rounding of the weights. DequantizeLinear gives float weights,
# and MatMul multiplies them by float activations, so the answers are those of the dequantized weights.
# Observed: from the extended optimizations on, which are the default, the two nodes become MatMulNBits at accuracy
# level 4, which rounds activations to 8 bits: errors are tens of thousands of times greater. The basic optimizations
# or session.qdq_matmulnbits_accuracy_level=1 give the file's numbers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cd "$work"
ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper


def session(nodes, inputs, outputs, constants=None, opset=17, level=None, **config):
    """A CPU session over a small graph; inputs and outputs are (name, type, shape)."""
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
    if level is not None:
        options.graph_optimization_level = level
    for name, value in config.items():
        options.add_session_config_entry(name.replace("__", "."), value)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


rng = np.random.default_rng(0)
weights = rng.integers(-127, 128, (64, 32)).astype(np.int8)
x = rng.normal(size=(4, 64)).astype(np.float32)
exact = x.astype(np.float64) @ (weights * np.float64(np.float32(0.01)))
nodes = [helper.make_node("DequantizeLinear", ["w", "scale"], ["wf"]), helper.make_node("MatMul", ["x", "wf"], ["y"])]
entry = [("x", TensorProto.FLOAT, ["batch", 64])], [("y", TensorProto.FLOAT, ["batch", 32])]


def error(**options):
    kernel = session(nodes, *entry, {"w": weights, "scale": np.float32(0.01)}, **options)
    return float(np.abs(kernel.run(None, {"x": x})[0] - exact).max())


found = error()
basic = error(level=ort.GraphOptimizationLevel.ORT_ENABLE_BASIC)
level_1 = error(session__qdq_matmulnbits_accuracy_level="1")
print(f"values up to {np.abs(exact).max():.1f}; errors: default {found:.1e}, basic {basic:.1e}, level 1 {level_1:.1e}")
assert max(basic, level_1) < 1e-4, "the control: float products"
if found < 1e-3:
    raise SystemExit("activations are not rounded: the behaviour is no longer there")
PYTHON
