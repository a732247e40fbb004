#!/usr/bin/env bash
# GroupQueryAttention computes other outputs when its present_key and present_value are connected.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
# Expected by most: optional outputs are reported or not, and change nothing else.
# Observed: the CPU has two kernels, and the outputs that are connected choose between them. They agree wherever a
# query has a key to attend to. A query whose attention_bias is the lowest float32 for every key gets the mean of the
# values from one kernel, and zeros from the other. So a graph changes its answers when a tool adds or prunes the cache
# outputs.
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


rng = np.random.default_rng(0)
heads, head_size, length = 2, 16, 4
width = heads * head_size
feeds = {name: rng.normal(size=(1, length, width)).astype(np.float32) for name in "qkv"}
feeds |= {"ends": np.array([length - 1], np.int32), "total": np.array(length, np.int32)}
feeds["bias"] = np.zeros((1, 1, length, length), np.float32)
feeds["bias"][0, 0, 2] = np.finfo(np.float32).min
inputs = [(name, TensorProto.FLOAT, ["batch", "length", width]) for name in "qkv"]
inputs += [("ends", TensorProto.INT32, ["batch"]), ("total", TensorProto.INT32, [])]
inputs += [("bias", TensorProto.FLOAT, ["batch", 1, "length", "keys"])]
names = ["q", "k", "v", "", "", "ends", "total", "", "", "", "bias"]


def attend(*outputs):
    node = helper.make_node(
        "GroupQueryAttention", names, list(outputs), domain="com.microsoft", num_heads=heads, kv_num_heads=heads
    )
    run = session([node], inputs, [(name, TensorProto.FLOAT, None) for name in outputs])
    return run.run(["y"], feeds)[0][0]


alone, connected = attend("y"), attend("y", "present_key", "present_value")
for row in range(length):
    print(f"query {row}: greatest difference {np.abs(alone[row] - connected[row]).max():.2g}")
assert np.allclose(alone[[0, 1, 3]], connected[[0, 1, 3]], atol=1e-5), "the control: other queries agree"
assert np.allclose(alone[2], feeds["v"][0, :3].mean(axis=0), atol=1e-5), "alone: the mean of the values up to the query"
if np.abs(connected[2]).max() > 0:
    raise SystemExit("with connected outputs the query no longer gets zeros: the behaviour is no longer there")
PYTHON
