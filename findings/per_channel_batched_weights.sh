#!/usr/bin/env bash
# quantize_dynamic(per_channel=True) on weights with three axes writes a file that loads, and fails at every run.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source: https://github.com/microsoft/onnxruntime/issues/25489
# Expected by most: what the quantizer writes without a warning, and a session loads, can be run. Weights of several
# experts, or of heads, are stacked in such tensors.
# Observed: scale and zero point get one axis, (columns,), where the product of stacked matrices needs (experts, 1,
# columns). Neither the quantizer nor loading looks at it. Without per_channel the file runs.
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
    [helper.make_node("MatMul", ["x", "w"], ["y"], name="experts")],
    "experts",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, "tokens", 16])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2, "tokens", 8])],
    [numpy_helper.from_array(np.random.default_rng(0).normal(size=(2, 16, 8)).astype(np.float32), "w")],
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "float.onnx")
options = ort.SessionOptions()
options.log_severity_level = 4
for per_channel in (False, True):
    quantize_dynamic("float.onnx", "int8.onnx", per_channel=per_channel)
    shapes = {tensor.name: list(tensor.dims) for tensor in onnx.load("int8.onnx").graph.initializer}
    run = ort.InferenceSession("int8.onnx", options, providers=["CPUExecutionProvider"])
    try:
        run.run(None, {"x": np.ones((1, 2, 3, 16), np.float32)})
        runs = True
    except Exception as fault:
        runs = False
        assert "zero point" in str(fault), str(fault)
    print(f"per_channel={per_channel}: {shapes}; loads, and {'runs' if runs else 'does not run'}")
    assert runs != per_channel
PYTHON
