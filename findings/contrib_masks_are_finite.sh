#!/usr/bin/env bash
# A masked key of com.microsoft Attention and MultiHeadAttention is not hidden: 10,000 is subtracted from its score.
#
# Versions: onnxruntime 1.32.0 (CPU).
# Source: attribute mask_filter_value, default -10000,
# https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.Attention
# Expected by most: an integer mask, as onnxruntime's BERT optimizer writes it, hides padding completely, and a mask of
# zeros gives a constant or NaN.
# Observed: where a score of a masked key exceeds the others by more than 10,000, that key takes all of the attention.
# A mask of zeros equals a mask of ones: padding then is attended like text. The same holds for a row of length 0.
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


identity = np.concatenate([np.eye(4)] * 3, axis=1).astype(np.float32)  # query = key = value = x
attention = session(
    [helper.make_node("Attention", ["x", "w", "b", "mask"], ["y"], domain="com.microsoft", num_heads=1)],
    [("x", TensorProto.FLOAT, ["b", "s", 4]), ("mask", TensorProto.INT32, ["b", "s"])],
    [("y", TensorProto.FLOAT, None)],
    {"w": identity, "b": np.zeros(12, np.float32)},
)
multi_head = session(
    [helper.make_node("MultiHeadAttention", ["x", "x", "x", "", "mask"], ["y"], domain="com.microsoft", num_heads=1)],
    [("x", TensorProto.FLOAT, ["b", "s", 4]), ("mask", TensorProto.INT32, ["b", "s"])],
    [("y", TensorProto.FLOAT, None)],
)
small = np.array([[[1, 0, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0]]], np.float32)
large = 200 * small
for name, run in {"Attention": attention, "MultiHeadAttention": multi_head}.items():

    def first(x, mask):
        return float(run.run(None, {"x": x, "mask": np.array([mask], np.int32)})[0][0, 0, 0])

    hidden, leaking = first(small, [1, 1, 0]), first(large, [1, 1, 0])
    none, ones = first(small, [0, 0, 0]), first(small, [1, 1, 1])
    print(f"{name}: third key masked, small scores {hidden:.4f}, large scores {leaking:.1f} (its value is 400)")
    print(f"{name}: mask of zeros {none:.4f}, mask of ones {ones:.4f}")
    assert abs(hidden - 1) < 1e-4, "with small scores the masked key is hidden"
    assert abs(leaking - 400) < 1e-2, "the masked key no longer wins"
    assert none == ones, "a mask of zeros no longer equals a mask of ones"
PYTHON
