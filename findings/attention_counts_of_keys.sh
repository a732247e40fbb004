#!/usr/bin/env bash
# Attention with counts of keys and is_causal: zeros behind the queries move every query, those behind the keys none.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source: nonpad_kv_seqlen and is_causal, https://onnx.ai/onnx/operators/onnx__Attention.html
# Expected by most: nonpad_kv_seqlen is there for padded batches, so a sequence may be padded in queries, keys and
# values, and its own queries keep their answers. Under a causal mask each query attends to the keys up to its
# own position.
# Observed: the last of L queries stands at the last counted key, so query i attends to the keys up to i + count - L.
# With 4 queries of padding, the first 4 of 5 queries have no key and are zeros, and the fifth has one. The reference of
# the onnx package agrees. A server that pads must pad keys only, or give a mask.
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
from onnx.reference import ReferenceEvaluator

heads, width = 2, 8
inputs = [helper.make_tensor_value_info("q", TensorProto.FLOAT, ["batch", heads, "queries", width])]
inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", heads, "keys", width]) for name in "kv"]
inputs += [helper.make_tensor_value_info("counts", TensorProto.INT64, ["batch"])]
node = helper.make_node("Attention", ["q", "k", "v", "", "", "", "counts"], ["y"], is_causal=1)
output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", heads, "queries", width])
graph = helper.make_graph([node], "finding", inputs, [output])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
reference = ReferenceEvaluator(model)


def padded(array, zeros):
    return np.pad(array, ((0, 0), (0, 0), (0, zeros), (0, 0)))


length, padding = 5, 4
rng = np.random.default_rng(0)
q, k, v = (rng.normal(size=(1, heads, length, width)).astype(np.float32) for _ in range(3))
counts = np.array([length])
alone = session.run(None, {"q": q, "k": k, "v": v, "counts": counts})[0]
feeds = {"q": q, "k": padded(k, padding), "v": padded(v, padding), "counts": counts}
assert np.abs(session.run(None, feeds)[0] - alone).max() < 1e-6, "the control: padded keys change nothing"
feeds["q"] = padded(q, padding)
both = session.run(None, feeds)[0][:, :, :length]
assert np.abs(reference.run(None, feeds)[0][:, :, :length] - both).max() < 1e-5, "the reference differs"
zeros = [position for position in range(length) if not both[:, :, position].any()]
change = np.abs(both - alone).max()
print(f"{length} queries and {padding} of padding: queries {zeros} are zeros; greatest change {change:.2f}")
if zeros != list(range(padding)):
    raise SystemExit("the own queries keep their keys: the behaviour is no longer there")
# With 4 queries of padding, the fifth attends to the first key only.
assert np.abs(both[:, :, padding] - v[:, :, 0]).max() < 1e-6
PYTHON
