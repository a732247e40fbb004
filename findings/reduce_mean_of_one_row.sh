#!/usr/bin/env bash
# ReduceMean over the second axis takes several times as long for a batch of one as for a batch of two.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source: the operator, https://onnx.ai/onnx/operators/onnx__ReduceMean.html; the kernel for kept, reduced and kept axes
# is used from two rows on, and from as many as there are threads (onnxruntime/core/providers/cpu/reduction/reduction_ops.cc).
# Expected by most: a row of a batch takes as long as a row alone, and has the same numbers.
# Observed: the mean over heads of attention weights (1, 12, 128, 128) takes seven times as long as (2, 12, 128, 128), and
# differs from its row there in the last bits. A product with ones, which computes the same, does neither.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cd "$work"
ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - <<'PYTHON'
import statistics
import time

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

HEADS, LENGTH = 12, 128


def session(nodes, constants):
    """A CPU session of one thread over weights (rows, heads, queries, keys)."""
    graph = helper.make_graph(
        nodes,
        "finding",
        [helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["rows", HEADS, LENGTH, LENGTH])],
        [helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["rows", "some", "others"])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def milliseconds(run, weights):
    times = []
    for _ in range(50):
        begun = time.perf_counter()
        run(weights)
        times.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(times)


node = helper.make_node
reduced = session([node("ReduceMean", ["weights", "axis"], ["mean"], keepdims=0)], {"axis": np.array([1])})
product = session(
    [
        node("Reshape", ["weights", "flat"], ["rows_by_heads"]),
        node("MatMul", ["ones", "rows_by_heads"], ["sums"]),
        node("Div", ["sums", "heads"], ["mean"]),
    ],
    {
        "flat": np.array([-1, HEADS, LENGTH * LENGTH]),
        "ones": np.ones((1, HEADS), np.float32),
        "heads": np.array(HEADS, np.float32),
    },
)
weights = np.random.default_rng(0).random((2, HEADS, LENGTH, LENGTH), np.float32)
weights /= weights.sum(axis=-1, keepdims=True)
exact = weights.astype(np.float64).mean(axis=1).reshape(2, -1)
found = {}
for name, made in (("ReduceMean", reduced), ("product with ones", product)):

    def run(rows, made=made):
        return made.run(None, {"weights": rows})[0].reshape(len(rows), -1)

    assert np.abs(run(weights) - exact).max() < 1e-6, "the control: both compute the mean"
    one, two = milliseconds(run, weights[:1]), milliseconds(run, weights)
    same = np.array_equal(run(weights[:1])[0], run(weights)[0])
    found[name] = one / two, same
    print(f"{name}: one row takes {one:.3f} ms, two rows take {two:.3f} ms; a row alone has the same bits: {same}")
assert found["product with ones"][1], "the control: a row alone has the bits of a row of the batch"
ratio, same = found["ReduceMean"]
if ratio < 2 and same:
    raise SystemExit("one row takes as long as a row of two, with the same bits: the behaviour is no longer there")
PYTHON
