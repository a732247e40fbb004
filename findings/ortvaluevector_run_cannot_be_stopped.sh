#!/usr/bin/env bash
# RunOptions.terminate stops run() and run_with_iobinding(), and has no effect on run_with_ortvaluevector().
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source: "terminate: Set to True to terminate any currently executing Run() calls that are using this RunOptions
# instance", https://onnxruntime.ai/docs/api/python/api_summary.html. The method's binding takes the options by value
# (onnxruntime/python/onnxruntime_pybind_state.cc), so that the run reads a copy.
# Expected by most: the run stops at its next node, as the other two do.
# Observed: the run goes on to its end, and returns its outputs without an error. A server that must stop runs for
# callers who have left cannot use the method, although it alone copies inputs and outputs within the run.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cd "$work"
ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - <<'PYTHON'
import threading
import time

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import _pybind_state as native

SECONDS, STOP_AFTER_S = 6.0, 0.5


def session(steps):
    """A CPU session over a loop of small steps."""
    info, node = helper.make_tensor_value_info, helper.make_node
    body = helper.make_graph(
        [node("Identity", ["going"], ["still"]), node("Mul", ["state", "decay"], ["next"])],
        "body",
        [info("step", TensorProto.INT64, []), info("going", TensorProto.BOOL, []), info("state", TensorProto.FLOAT, [3])],
        [info("still", TensorProto.BOOL, []), info("next", TensorProto.FLOAT, [3])],
        [numpy_helper.from_array(np.array(0.5, np.float32), "decay")],
    )
    graph = helper.make_graph(
        [node("Loop", ["steps", "always", "x"], ["y"], body=body)],
        "finding",
        [info("x", TensorProto.FLOAT, [3])],
        [info("y", TensorProto.FLOAT, [3])],
        [numpy_helper.from_array(np.array(steps), "steps"), numpy_helper.from_array(np.array(True), "always")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


x = np.ones(3, np.float32)


def plain(made, options):
    made.run(["y"], {"x": x}, options)


def bound(made, options):
    binding = made.io_binding()
    binding.bind_cpu_input("x", x)
    binding.bind_output("y")
    made.run_with_iobinding(binding, options)


def vectors(made, options):
    cpu = native.OrtDevice(native.OrtDevice.cpu(), native.OrtDevice.default_memory(), 0)
    feeds, fetches = native.OrtValueVector(), native.OrtValueVector()
    feeds.push_back(native.OrtValue.ortvalue_from_numpy(x, cpu))
    made.run_with_ortvaluevector(options, ["x"], feeds, ["y"], fetches, [cpu])


def seconds(method, made, options):
    begun = time.perf_counter()
    try:
        method(made, options)
        how = "returned its outputs"
    except Exception as error:
        assert "terminate" in str(error), error
        how = "was terminated"
    return time.perf_counter() - begun, how


sample = 200_000
took, _ = seconds(plain, session(sample), ort.RunOptions())
made = session(int(sample * SECONDS / took))
ended = {}
for method in (plain, bound, vectors):
    options = ort.RunOptions()
    timer = threading.Timer(STOP_AFTER_S, lambda options=options: setattr(options, "terminate", True))
    timer.start()
    took, ended[method] = seconds(method, made, options)
    timer.join()
    print(f"{method.__name__}: stopped after {STOP_AFTER_S} s, it {ended[method]} after {took:.1f} s")
assert ended[plain] == ended[bound] == "was terminated", "the control: the other methods stop"
if ended[vectors] == "was terminated":
    raise SystemExit("the run stops: the behaviour is no longer there")
PYTHON
