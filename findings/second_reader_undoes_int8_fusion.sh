#!/usr/bin/env bash
# One more reader of an int8 value undoes the fusion of the product beside it; without VNNI other answers move.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2, x86-64.
# Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, on QDQ and S8S8.
# Expected by most: an added output reads a value and changes no other answer.
# Observed: the runtime fuses DequantizeLinear, MatMul and QuantizeLinear to QLinearMatMul. On x86 it first rewrites
# int8 activations to uint8, but only those with one reader. A second reader of the int8 value leaves the pair as it
# is, and the product beside it is computed in float. uint8 values keep their fusion with any number of readers. On
# processors without VNNI, where the fused product saturates, an answer moved by 2.6 of values up to 6.4. A server that
# returns inner values of a quantized file must read them as uint8.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cd "$work"
ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - <<'PYTHON'
import platform

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

if platform.machine() not in ("x86_64", "AMD64"):
    print("skipped: the runtime rewrites int8 to uint8 on x86 only")
    raise SystemExit(0)
rng = np.random.default_rng(0)
weights = rng.integers(-127, 128, (64, 32)).astype(np.int8)
feeds = {"x": rng.normal(size=(4, 64)).astype(np.float32)}


def run(dtype, second_reader):
    """Return the answer of a quantized product and the operators of the optimized graph."""
    constants = {
        **{"xs": np.float32(0.02), "z": dtype(0 if dtype is np.int8 else 128), "ys": np.float32(0.05)},
        **{"w": weights, "ws": np.float32(0.01), "wz": np.int8(0)},
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["product"]),
        helper.make_node("QuantizeLinear", ["product", "ys", "z"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "ys", "z"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 32])]
    if second_reader:
        nodes.append(helper.make_node("Identity", ["yq"], ["also"]))
        outputs.append(helper.make_tensor_value_info("also", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), None))
    graph = helper.make_graph(
        nodes,
        "finding",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        outputs,
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = "optimized.onnx"
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load("optimized.onnx").graph.node]
    return session.run(["y"], feeds)[0], operators


fused = {}
for dtype in (np.uint8, np.int8):
    alone, operators = run(dtype, second_reader=False)
    assert "QLinearMatMul" in operators, "the control: one reader"
    beside, operators = run(dtype, second_reader=True)
    fused[dtype] = "QLinearMatMul" in operators
    change = np.abs(beside - alone).max()
    print(f"{dtype.__name__}, a second reader: fused {fused[dtype]}, y moves by {change:.1f}")
    print(f"  values of y are up to {np.abs(alone).max():.1f}")
assert fused[np.uint8], "the control: uint8"
if fused[np.int8]:
    raise SystemExit("the product stays fused: the behaviour is no longer there")
PYTHON
