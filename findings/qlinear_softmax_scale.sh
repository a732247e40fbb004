#!/usr/bin/env bash
# QLinearSoftmax rounds the reciprocal of its output scale down: at a scale of 0.004, a single key has 0.996.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QLinearSoftmax;
# onnxruntime/contrib_ops/cpu/quantization/qlinear_softmax.cc in the same repository.
# Expected by most: the operator, which the runtime writes for DequantizeLinear, Softmax and QuantizeLinear, gives
# their numbers but for ties.
# Observed: 1 / 0.004 is 249.99998 in float32, and the operator multiplies by 249: every share is 0.4 % too small. At
# 1/128 and 1/200 the numbers are those of the three nodes. 249 / 6 is a tie, which falls either way: 6 equal keys have
# 42 steps each, and 41 beside 8 hidden keys, so that an answer depends on the padding.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cd "$work"
ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper


def session(nodes, inputs, outputs, constants=None, opset=17, **config):
    """A CPU session over a small graph; inputs and outputs are (name, type, shape)."""
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


def shares(scores, scale, fused, scores_scale=0.1):
    """The shares of a row of uint8 scores, in steps of `scale`."""
    constants = {
        **{"xs": np.float32(scores_scale), "xz": np.uint8(0)},
        **{"ys": np.float32(scale), "yz": np.uint8(0)},
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "xs", "xz"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=1),
        helper.make_node("QuantizeLinear", ["shares", "ys", "yz"], ["y"]),
    ]
    if fused:
        names = ["x", "xs", "xz", "ys", "yz"]
        nodes = [helper.make_node("QLinearSoftmax", names, ["y"], domain="com.microsoft", axis=1, opset=13)]
    entry = [("x", TensorProto.UINT8, ["batch", "keys"])], [("y", TensorProto.UINT8, ["batch", "keys"])]
    kernel = session(nodes, *entry, constants, session__disable_quant_qdq="1")
    return kernel.run(None, {"x": np.array([scores], np.uint8)})[0][0].tolist()


for scale in (1 / 200, 1 / 128):
    for keys in (1, 2, 3):
        both = [shares([100] * keys, scale, fused) for fused in (True, False)]
        assert both[0] == both[1], f"the control: a scale of {scale}"
found = [shares([100], 0.004, fused) for fused in (True, False)]
print("scale 0.004, one key: QLinearSoftmax", found[0], "and three nodes", found[1])
assert found[1] == [250]
hidden = [shares([100] * 6 + [0] * count, 0.004, fused=True, scores_scale=10)[0] for count in (0, 8)]
print("six equal keys, alone and beside eight hidden ones:", hidden)
if found[0] == [250]:
    raise SystemExit("the scale is exact: the behaviour is no longer there")
assert found[0] == [249] and hidden == [42, 41]
PYTHON
