#!/usr/bin/env bash
# OpenVINO's Relu and ReduceMax turn NaN into an ordinary number, so that a check of the answers for NaN finds nothing.
#
# Versions: openvino 2026.4.1 (CPU), onnxruntime 1.32.0 as the control, onnx 1.23.2; x86-64.
# Source: https://github.com/openvinotoolkit/openvino/issues/35649 (open);
# https://onnx.ai/onnx/operators/onnx__Relu.html; IEEE 754-2019, clause 9.6: maximum keeps a NaN, maximumNumber does
# not.
# Expected by most: a NaN within a network, from an overflow or a damaged weight, spreads to the output, where a server
# or a test looks for it.
# Observed: Relu of NaN is 0, ReduceMax and ReduceMin leave it out, while Tanh, Sigmoid and ReduceSum keep it. So a
# model with Relu answers with finite numbers where onnxruntime answers NaN, and a pooling by maximum leaves out a
# broken token.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 \
    openvino==2026.4.1
cd "$work"
ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnxruntime as ort
import openvino
from onnx import TensorProto, helper

core = openvino.Core()


def both(nodes, array):
    graph = helper.make_graph(
        nodes,
        "finding",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    found = core.compile_model(core.read_model(model), "CPU")({"x": array})[0]
    return session.run(None, {"x": array})[0], np.array(found)


row = np.array([[np.nan, -1, 2]], np.float32)
hidden = []
for operator in ("Relu", "ReduceMax", "ReduceMin", "Tanh", "Sigmoid", "ReduceSum"):
    axes = {"axes": [1]} if operator in ("ReduceMax", "ReduceMin") else {}
    control, found = both([helper.make_node(operator, ["x"], ["y"], **axes)], row)
    print(f"{operator} of {row[0].tolist()}: onnxruntime {control[0].tolist()}, OpenVINO {found[0].tolist()}")
    assert np.isnan(control).any(), "the control: onnxruntime keeps the NaN"
    if np.isfinite(found).all():
        hidden.append(operator)
# An overflow within a network: two infinities of opposite sign give NaN, and Relu makes it a number.
large = np.array([[3e38, 3e38]], np.float32)
nodes = [
    helper.make_node("Add", ["x", "x"], ["infinite"]),
    helper.make_node("Neg", ["infinite"], ["negative"]),
    helper.make_node("Add", ["infinite", "negative"], ["nan"]),
    helper.make_node("Relu", ["nan"], ["y"]),
]
control, found = both(nodes, large)
print("Relu behind an overflow: onnxruntime", control[0].tolist(), "OpenVINO", found[0].tolist())
if not hidden:
    raise SystemExit("every operator keeps NaN: the behaviour is no longer there")
assert hidden == ["Relu", "ReduceMax", "ReduceMin"], hidden
assert np.isnan(control).all()
assert np.isfinite(found).all()
PYTHON
