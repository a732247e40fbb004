#!/usr/bin/env bash
# onnxruntime's CPU kernel of ai.onnx Attention gives zeros for a query whose keys all have a mask of float32's lowest
# value, and the mean of the values for the next number above it.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source: the operator's definition, https://onnx.ai/onnx/operators/onnx__Attention.html: a float mask is added to the
# scores; fully masked rows and zeros are discussed in https://github.com/onnx/onnx/pull/8068.
# Expected by most: exporters write a padding mask as (1 - mask) * lowest, which is finite. If no key is allowed,
# adding one number to all scores changes nothing, so the softmax is spread over all keys. The written-out graph and
# onnx's reference evaluator do that.
# Observed: the kernel treats exactly the lowest value like -inf and gives zeros; at the next float32 above it, and at
# -1e9, it gives the mean. With -inf the written-out graph gives NaN, the operator zeros. So replacing written-out
# attention by the operator changes the answer of a request that masks everything, and nothing else.
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

LOWEST = np.finfo(np.float32).min
rng = np.random.default_rng(0)
feeds = {name: rng.normal(size=(1, 1, 3, 4)).astype(np.float32) for name in "qkv"}
shape = [1, 1, 3, 4]
inputs = [(name, TensorProto.FLOAT, shape) for name in "qkv"] + [("mask", TensorProto.FLOAT, [1, 1, 3, 3])]
outputs = [("y", TensorProto.FLOAT, None)]
operator = [helper.make_node("Attention", ["q", "k", "v", "mask"], ["y"])]
written_out = [
    helper.make_node("Transpose", ["k"], ["t"], perm=[0, 1, 3, 2]),
    helper.make_node("MatMul", ["q", "t"], ["products"]),
    helper.make_node("Mul", ["products", "scale"], ["scores"]),
    helper.make_node("Add", ["scores", "mask"], ["masked"]),
    helper.make_node("Softmax", ["masked"], ["weights"], axis=-1),
    helper.make_node("MatMul", ["weights", "v"], ["y"]),
]
graph = helper.make_graph(
    operator,
    "reference",
    [helper.make_tensor_value_info(*entry) for entry in inputs],
    [helper.make_tensor_value_info(*entry) for entry in outputs],
)
reference = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))
kernel = session(operator, inputs, outputs, opset=23)
decomposed = session(written_out, inputs, outputs, {"scale": np.float32(0.5)}, opset=23)
found = {}
for name, number in {"-1e9": -1e9, "above lowest": np.nextafter(LOWEST, np.float32(0)), "lowest": LOWEST, "-inf": -np.inf}.items():
    filled = {**feeds, "mask": np.full((1, 1, 3, 3), number, np.float32)}
    found[name] = [float(run.run(None, filled)[0][0, 0, 0, 0]) for run in (kernel, decomposed, reference)]
    print(f"{name:>12}: kernel {found[name][0]:.4f}, written out {found[name][1]:.4f}, reference {found[name][2]:.4f}")
mean = feeds["v"][0, 0, :, 0].mean()
assert found["lowest"][0] == 0, "the kernel no longer gives zeros at the lowest value"
assert np.allclose([found["lowest"][1], found["lowest"][2], found["above lowest"][0], found["-1e9"][0]], mean, atol=1e-5)
assert found["-inf"][0] == 0 and np.isnan(found["-inf"][1])
PYTHON
