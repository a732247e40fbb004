#!/usr/bin/env bash
# OpenVINO computes int64 tensors in 32 bits: an identity returns other numbers, labelled int64, without an error.
#
# Versions: openvino 2026.4.1 (CPU), onnxruntime 1.32.0 as the control, onnx 1.23.2.
# Source: https://github.com/openvinotoolkit/openvino/issues/35823 (Add, open);
# https://docs.openvino.ai/2024/openvino-workflow/running-inference/inference-devices-and-modes/cpu-device.html (INT32
# is the widest integer of the inner operations); https://onnx.ai/onnx/operators/onnx__Identity.html
# Expected by most: a model whose inputs and outputs are declared int64, and arrive as int64, has 64 bits between them.
# A runtime that cannot do that refuses the model or the number.
# Observed: 2**40 comes back from Identity as 0, 2**31 as -2**31, and 2**32 + 3 equals 3. Gather takes row 3 for the
# index 2**32 + 3, which onnxruntime refuses. Hashes, ids and times in microseconds come back as other numbers. What is
# out of range must be refused before the runtime.
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
from onnx import TensorProto, helper, numpy_helper

core = openvino.Core()


def answers(nodes, kind, numbers, constants=None):
    """The answers of onnxruntime and of OpenVINO to one int64 input."""
    graph = helper.make_graph(
        nodes,
        "finding",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = {"x": np.array(numbers, np.int64)}
    try:
        control = session.run(None, feeds)[0]
    except ort.capi.onnxruntime_pybind11_state.InvalidArgument:
        control = None
    return control, np.array(core.compile_model(core.read_model(model), "CPU")(feeds)[0])


numbers = [1, 2**31, 2**40, 2**32 + 3]
control, found = answers([helper.make_node("Identity", ["x"], ["y"])], TensorProto.INT64, numbers)
print("numbers given:         ", numbers)
print("Identity, onnxruntime: ", control.tolist(), control.dtype)
print("Identity, OpenVINO:    ", found.tolist(), found.dtype)
assert control.tolist() == numbers
assert found.dtype == np.int64

three = {"three": np.array([3], np.int64)}
control, equal = answers([helper.make_node("Equal", ["x", "three"], ["y"])], TensorProto.BOOL, numbers, three)
print("equal to 3, onnxruntime:", control.tolist())
print("equal to 3, OpenVINO:   ", equal.tolist())
assert control.tolist() == [False] * 4

table = {"table": np.arange(8, dtype=np.float32)}
control, row = answers([helper.make_node("Gather", ["table", "x"], ["y"])], TensorProto.FLOAT, [2**32 + 3], table)
print("row 2**32 + 3 of a table of 8 rows: onnxruntime refuses it, OpenVINO gives row", row.tolist())
assert control is None
if found.tolist() == numbers:
    raise SystemExit("int64 has 64 bits: the behaviour is no longer there")
assert found.tolist() == [1, -(2**31), 0, 3]
assert equal.tolist() == [False, False, False, True]
assert row.tolist() == [3.0]
PYTHON
