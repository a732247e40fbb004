#!/usr/bin/env bash
# A mask with fewer columns than keys is valid for ai.onnx Attention of opset 24; onnxruntime's CPU kernel refuses to
# run.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source: input attn_mask, https://onnx.ai/onnx/operators/onnx__Attention.html: the last axis may be shorter than the
# keys, and is then filled up with masked positions.
# Expected by most: either NumPy's rule (one column holds for all keys, as it does for the rows), or the definition's.
# Observed: the model loads, and each run fails because the lengths differ. onnx's reference evaluator follows the
# definition: with one column of True, every query attends to the first key only. NumPy's rule would show all keys.
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


from onnx.reference import ReferenceEvaluator

rng = np.random.default_rng(0)
feeds = {name: rng.normal(size=(1, 1, 3, 4)).astype(np.float32) for name in "qkv"}
inputs = [(name, TensorProto.FLOAT, [1, 1, 3, 4]) for name in "qkv"] + [("mask", TensorProto.BOOL, [3, "columns"])]
outputs = [("y", TensorProto.FLOAT, None)]
node = helper.make_node("Attention", ["q", "k", "v", "mask"], ["y"])
graph = helper.make_graph(
    [node],
    "short",
    [helper.make_tensor_value_info(*entry) for entry in inputs],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 3, 4])],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
reference = ReferenceEvaluator(model)
kernel = session([node], inputs, outputs, opset=24)
mask = np.ones((3, 1), bool)
y = reference.run(None, {**feeds, "mask": mask})[0]
assert np.allclose(y[0, 0], feeds["v"][0, 0, :1], atol=1e-6), "the reference no longer fills the mask up"
print("reference, one column of True: every query gets the value of the first key")
kernel.run(None, {**feeds, "mask": np.ones((3, 3), bool)})
try:
    kernel.run(None, {**feeds, "mask": mask})
except Exception as fault:
    print("kernel:", str(fault).strip()[-110:])
    assert "total_sequence_length" in str(fault), str(fault)
else:
    raise SystemExit("the kernel runs a short mask: the behaviour is no longer there")
PYTHON
