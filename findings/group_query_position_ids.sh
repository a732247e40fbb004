#!/usr/bin/env bash
# GroupQueryAttention reads only the first of a sequence's position_ids, and counts on from it.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source: input position_ids, "2D tensor with shape (batch_size, sequence_length)",
# https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
# Expected by most: each token is rotated by its own position id, as the standard RotaryEmbedding does, so that left
# padding, packed sequences and gaps can be expressed.
# Observed: with do_rotary, ids 5, 0, 0, 0 give the same bits as 5, 6, 7, 8, and 0, 10, 20, 30 the same as 0, 1, 2, 3.
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
heads, head_size, length, most = 2, 16, 4, 64
width = heads * head_size
angles = np.arange(most)[:, None] * 10.0 ** -np.arange(head_size // 2)
feeds = {name: rng.normal(size=(1, length, width)).astype(np.float32) for name in "qkv"}
feeds |= {"ends": np.array([length - 1], np.int32), "total": np.array(length, np.int32)}
feeds |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
inputs = [(name, TensorProto.FLOAT, ["batch", "length", width]) for name in "qkv"]
inputs += [("ends", TensorProto.INT32, ["batch"]), ("total", TensorProto.INT32, [])]
inputs += [(name, TensorProto.FLOAT, [most, head_size // 2]) for name in ("cos", "sin")]
inputs += [("position_ids", TensorProto.INT64, ["batch", "length"])]
names = ["q", "k", "v", "", "", "ends", "total", "cos", "sin", "position_ids"]
options = {"domain": "com.microsoft", "num_heads": heads, "kv_num_heads": heads, "do_rotary": 1}
node = helper.make_node("GroupQueryAttention", names, ["y"], **options)
run = session([node], inputs, [("y", TensorProto.FLOAT, None)])


def attend(*ids):
    return run.run(None, {**feeds, "position_ids": np.array([ids], np.int64)})[0]


def rotated(array, ids):
    """The definition: halves of each head, rotated by the angle of each token's id."""
    parts = array.reshape(length, heads, 2, head_size // 2)
    cos, sin = np.cos(angles)[list(ids)][:, None], np.sin(angles)[list(ids)][:, None]
    first, second = parts[:, :, 0], parts[:, :, 1]
    return np.stack([first * cos - second * sin, first * sin + second * cos], axis=2)


def defined(*ids):
    q, k = (rotated(feeds[name][0], ids).reshape(length, heads, head_size) for name in "qk")
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head_size)
    scores[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, feeds["v"][0].reshape(length, heads, head_size)).reshape(1, length, width)


for ids in ((0, 1, 2, 3), (0, 10, 20, 30), (5, 6, 7, 8), (5, 0, 0, 0)):
    print(f"ids {ids}: off the definition by {np.abs(attend(*ids) - defined(*ids)).max():.2g}")
assert np.allclose(attend(0, 1, 2, 3), defined(0, 1, 2, 3), atol=1e-5), "the control: ids in a row"
assert np.abs(defined(0, 10, 20, 30) - defined(0, 1, 2, 3)).max() > 0.01, "the control: the definition depends on the ids"
if (attend(0, 10, 20, 30) != attend(0, 1, 2, 3)).any() or (attend(5, 0, 0, 0) != attend(5, 6, 7, 8)).any():
    raise SystemExit("later ids count: the behaviour is no longer there")
PYTHON
