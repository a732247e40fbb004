#!/usr/bin/env bash
# GroupQueryAttention continues several sequences at once only token by token: two rows with two new tokens each fail.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source: the shapes of query, (batch_size, sequence_length, hidden_size), and past_key, (batch_size, kv_num_heads,
# past_sequence_length, head_size), state no such limit,
# https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
# Expected by most: a batch of sequences with pasts of equal length runs for any number of new tokens, as it does with
# ai.onnx Attention and MultiHeadAttention.
# Observed: one row with two new tokens runs, and so do two rows with one each; two rows with two each raise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cd "$work"
ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

heads, head_size, past = 2, 16, 3
width = heads * head_size
inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "new", width]) for name in "qkv"]
inputs += [
    helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", heads, "past", head_size])
    for name in ("past_key", "past_value")
]
inputs += [
    helper.make_tensor_value_info("ends", TensorProto.INT32, ["batch"]),
    helper.make_tensor_value_info("total", TensorProto.INT32, []),
]
names = ["q", "k", "v", "past_key", "past_value", "ends", "total"]
outputs = ["y", "present_key", "present_value"]
node = helper.make_node(
    "GroupQueryAttention", names, outputs, domain="com.microsoft", num_heads=heads, kv_num_heads=heads
)
graph = helper.make_graph(
    [node], "finding", inputs, [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
)
imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
options = ort.SessionOptions()
options.log_severity_level = 4
model = helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def runs(rows, new):
    rng = np.random.default_rng(0)
    feeds = {name: rng.normal(size=(rows, new, width)).astype(np.float32) for name in "qkv"}
    feeds |= {
        name: rng.normal(size=(rows, heads, past, head_size)).astype(np.float32) for name in ("past_key", "past_value")
    }
    feeds |= {"ends": np.full(rows, past + new - 1, np.int32), "total": np.array(past + new, np.int32)}
    try:
        session.run(None, feeds)
    except Exception as error:
        print(f"{rows} rows, {new} new tokens: {str(error).splitlines()[0][-90:]}")
        return False
    print(f"{rows} rows, {new} new tokens: runs")
    return True


assert runs(1, 1) and runs(2, 1), "the control: single tokens"
assert runs(1, 2), "the control: one row"
if runs(2, 2):
    raise SystemExit("two rows with two new tokens run: the behaviour is no longer there")
PYTHON
