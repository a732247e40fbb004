#!/usr/bin/env bash
# A valid model does not load with session.x64quantprecision where two nodes share int8 weights, or only a zero point.
#
# Versions: onnxruntime 1.32.0 (CPU). Processors with AVX2 and without VNNI; skipped elsewhere.
# Source: the option's description, https://github.com/microsoft/onnxruntime/pull/12088
# Expected by most: an option that makes products exact can be set for every model. Models that share layers (ALBERT),
# and files whose zero points were merged, share initializers legitimately.
# Observed: the rewriting that makes weights unsigned adds the unsigned copy under one name for each node, and
# initialization fails at the second. Without the option the model loads, and its products saturate.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! grep -q -m1 -w avx2 /proc/cpuinfo 2>/dev/null || grep -q -m1 -E 'avx512_vnni|avx_vnni' /proc/cpuinfo; then
    echo "skipped: only x86-64 processors with AVX2 and without VNNI show this"
    exit 0
fi
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


inputs = [("x", TensorProto.UINT8, ["rows", 64])]
outputs = [("y", TensorProto.INT32, None), ("z", TensorProto.INT32, None)]
weights = np.full((64, 32), 127, np.int8)
cases = {
    "two nodes share their weights": (
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"]), helper.make_node("MatMulInteger", ["x", "w"], ["z"])],
        {"w": weights},
    ),
    "two nodes share a zero point": (
        [
            helper.make_node("MatMulInteger", ["x", "w", "", "zero"], ["y"]),
            helper.make_node("MatMulInteger", ["x", "v", "", "zero"], ["z"]),
        ],
        {"w": weights, "v": weights - 1, "zero": np.int8(0)},
    ),
    "each node has its own": (
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"]), helper.make_node("MatMulInteger", ["x", "v"], ["z"])],
        {"w": weights, "v": weights - 1},
    ),
}
for name, (nodes, constants) in cases.items():
    # Level "basic" and above would merge the two equal nodes of the first case: they get separate inputs.
    nodes[1].input[0] = "x2"
    both = [*inputs, ("x2", TensorProto.UINT8, ["rows", 64])]
    session(nodes, both, outputs, constants)
    try:
        session(nodes, both, outputs, constants, session__x64quantprecision="1")
        loads = True
    except Exception as fault:
        loads = False
        assert "AddInitializer" in str(fault), str(fault)
    print(f"{name}: loads without the option, {'and' if loads else 'but not'} with it")
    assert loads == (name == "each node has its own"), name
PYTHON
