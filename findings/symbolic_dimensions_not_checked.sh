#!/usr/bin/env bash
# Two inputs that both declare [batch, sequence] may have different shapes, for onnxruntime and for
# onnx's checker.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source: "Static tensor shapes", https://github.com/onnx/onnx/blob/main/docs/IR.md: a dimension variable has
# one value across the whole graph.
# Expected by most: feeding a mask of another length than the ids is refused, and an output that declares [batch,
# sequence] has these axes in this order.
# Observed: a session runs inputs of (2, 3) and (5, 7) under the same two names, because the names are not compared.
# The checker passes, with full_check, an output whose declared names are swapped, and even one that swaps a name with
# a fixed size. So declared names do not show which axis of an output is the batch.
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


run = session(
    [
        helper.make_node("ReduceSum", ["ids"], ["first"], keepdims=0),
        helper.make_node("ReduceSum", ["mask"], ["second"], keepdims=0),
        helper.make_node("Add", ["first", "second"], ["y"]),
    ],
    [(name, TensorProto.FLOAT, ["batch", "sequence"]) for name in ("ids", "mask")],
    [("y", TensorProto.FLOAT, None)],
)
total = float(run.run(None, {"ids": np.ones((2, 3), np.float32), "mask": np.ones((5, 7), np.float32)})[0])
print("sum over inputs of shapes (2, 3) and (5, 7), both declared [batch, sequence]:", total)
assert total == 41
for shape in (["batch", "sequence"], ["batch", 3]):
    graph = helper.make_graph(
        [helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0])],
        "swapped",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    swapped = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = swapped.run(None, {"x": np.ones((2, 3), np.float32)})[0].shape
    print(f"output declared {shape}: shape {found} for an input of shape (2, 3); the checker passes")
    assert found == (3, 2)
PYTHON
