#!/usr/bin/env bash
# EmbedLayerNormalization of onnxruntime's BERT optimizer counts the ones of a mask, so Attention hides other keys.
#
# Versions: onnxruntime 1.32.0 (CPU).
# Source:
# https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.EmbedLayerNormalization
# Expected by most: an optimized BERT (O2 of optimum and sentence-transformers) honours the attention mask that it is
# given, as the source does.
# Observed: mask_index is the number of ones. Attention takes it as the length of the sequence, and hides the keys
# behind it: for the left-padded mask [0, 0, 1, 1] it hides the last two keys, which are the text, and attends to the
# padding. Masks with holes lose their last keys in the same way. Right-padded masks are not affected, so tests with
# these pass.
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


ids, width = np.array([[0, 1, 2, 3]], np.int32), 4
embedded = helper.make_node(
    "EmbedLayerNormalization",
    ["ids", "", "words", "positions", "", "gain", "offset", "mask"],
    ["hidden", "mask_index"],
    domain="com.microsoft",
)
attended = helper.make_node("Attention", ["values", "w", "b", "mask_index"], ["y"], domain="com.microsoft", num_heads=1)
identity = np.concatenate([np.zeros((4, 8)), np.eye(4)], axis=1).astype(np.float32)  # equal scores, value = x
run = session(
    [embedded, attended],
    [
        ("ids", TensorProto.INT32, ["batch", "sequence"]),
        ("mask", TensorProto.INT32, ["batch", "sequence"]),
        ("values", TensorProto.FLOAT, ["batch", "sequence", width]),
    ],
    [("mask_index", TensorProto.INT32, None), ("y", TensorProto.FLOAT, None)],
    {
        "words": np.eye(4, dtype=np.float32),
        "positions": np.zeros((8, 4), np.float32),
        "gain": np.ones(4, np.float32),
        "offset": np.zeros(4, np.float32),
        "w": identity,
        "b": np.zeros(12, np.float32),
    },
)
values = np.eye(4, dtype=np.float32)[None]  # the output of any query is then its row of weights
for mask, expected in (([1, 1, 0, 0], [0, 1]), ([0, 0, 1, 1], [0, 1]), ([1, 0, 1, 1], [0, 1, 2])):
    index, y = run.run(None, {"ids": ids, "mask": np.array([mask], np.int32), "values": values})
    keys = np.flatnonzero(y[0, 0] > 0.01).tolist()
    print(f"mask {mask}: mask_index {index.tolist()}, attended keys {keys}")
    assert index.tolist() == [sum(mask)] and keys == expected
PYTHON
