#!/usr/bin/env bash
# RunOptions.only_execute_path_to_fetches is accepted and has no effect: every node of the graph runs.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source: "Only execute the nodes needed by fetch list", https://onnxruntime.ai/docs/api/python/api_summary.html;
# https://github.com/microsoft/onnxruntime/issues/16013 (only builds for training have it).
# Expected by most: with the option set, a run computes the fetched output and nothing else.
# Observed: the profile of a run that fetches one output lists the nodes of both, with the option and without.
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


import json

size = 64
weights = {name: np.eye(size, dtype=np.float32) for name in ("w", "v")}
nodes = [
    helper.make_node("MatMul", ["x", "w"], ["fetched"], name="fetched"),
    helper.make_node("MatMul", ["x", "v"], ["unfetched"], name="unfetched"),
]
graph = helper.make_graph(
    nodes,
    "two",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", size])],
    [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size]) for name in ("fetched", "unfetched")],
    [numpy_helper.from_array(array, name) for name, array in weights.items()],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
options = ort.SessionOptions()
options.enable_profiling = True
profiled = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
run_options = ort.RunOptions()
run_options.only_execute_path_to_fetches = True
profiled.run(["fetched"], {"x": np.ones((8, size), np.float32)}, run_options)
with open(profiled.end_profiling()) as profile:
    ran = {event["name"] for event in json.load(profile) if event.get("cat") == "Node"}
print("nodes that ran:", ", ".join(sorted(ran)))
assert any(name.startswith("fetched") for name in ran), "the control: the fetched node runs"
if not any(name.startswith("unfetched") for name in ran):
    raise SystemExit("the option has an effect: the behaviour is no longer there")
PYTHON
