#!/usr/bin/env bash
# On x86-64 processors without VNNI, quantize_dynamic(per_channel=True) gives a worse model than per_channel=False.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2. Processors with AVX2 and without VNNI; skipped elsewhere.
# Source: session option session.x64quantprecision, https://github.com/microsoft/onnxruntime/pull/12088, and "U8S8
# saturation", https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
# Expected by most: a scale for each column is at least as exact as one for the whole matrix, and int8 gives the same
# numbers on each processor.
# Observed: products of unsigned by signed bytes are added in pairs in 16 bits, which saturate. With a scale per column
# every column has weights of 127, so saturation is frequent: the mean error is 1.6 times that of one scale for the
# matrix, and 3 times that of uint8 weights. The session option makes the products exact. Nothing warns.
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


from onnxruntime.quantization import QuantType, quantize_dynamic

rng = np.random.default_rng(0)
weights = rng.normal(size=(64, 8)).astype(np.float32)
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
    "float",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 64])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 8])],
    [numpy_helper.from_array(weights, "w")],
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "float.onnx")
x = rng.normal(size=(64, 64)).astype(np.float32)


def error(precise, **options):
    quantize_dynamic("float.onnx", "int8.onnx", **options)
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.x64quantprecision", precise)
    run = ort.InferenceSession("int8.onnx", settings, providers=["CPUExecutionProvider"])
    return float(np.abs(run.run(None, {"x": x})[0] - x @ weights).mean())


per_channel, exact = error("0", per_channel=True), error("1", per_channel=True)
per_tensor, unsigned = error("0"), error("0", weight_type=QuantType.QUInt8)
print(f"mean error: int8 per channel {per_channel:.4f}, per tensor {per_tensor:.4f}, uint8 per tensor {unsigned:.4f}")
print(f"int8 per channel with session.x64quantprecision=1: {exact:.4f}")
assert per_channel > 1.2 * per_tensor and per_channel > 2 * unsigned, "per channel is no longer worse"
assert exact < 0.5 * per_channel, "the session option no longer makes it exact"
PYTHON
