#!/usr/bin/env bash
# quantize_dynamic turns the standard operator Attention (opset 23) into a file that no session can load.
#
# Versions: onnxruntime 1.32.0, onnx 1.23.2.
# Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html#transformer-based-models, and
# the standard operator, https://onnx.ai/onnx/operators/onnx__Attention.html
# Expected by most: operators that the quantizer does not know are left in float32. torch's exporter (dynamo) writes
# the standard Attention at opset 23.
# Observed: the quantizer looks at the operator's name only, takes it for com.microsoft Attention, and writes a
# com.microsoft QAttention with inputs of other meanings. It reports success; the session refuses the file as an
# invalid graph. With op_types_to_quantize=["MatMul"] the file is right.
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
    [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="project"),
        helper.make_node("Attention", ["h", "h", "h"], ["y"], name="attend", q_num_heads=2, kv_num_heads=2),
    ],
    "attention",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "sequence", 8])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", 8])],
    [numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
onnx.save(model, "float.onnx")
ort.InferenceSession("float.onnx", providers=["CPUExecutionProvider"])


def load(**options):
    quantize_dynamic("float.onnx", "int8.onnx", **options)
    print([f"{node.domain or 'ai.onnx'}.{node.op_type}" for node in onnx.load("int8.onnx").graph.node])
    ort.InferenceSession("int8.onnx", providers=["CPUExecutionProvider"])


load(op_types_to_quantize=["MatMul"])
try:
    load()
except Exception as fault:
    print(type(fault).__name__, str(fault)[:120])
    assert "QAttention" in str(fault), str(fault)
else:
    raise SystemExit("the quantized file loads: the behaviour is no longer there")
PYTHON
