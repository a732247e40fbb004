#!/usr/bin/env bash
# InferenceSession.run with an empty list of outputs returns all outputs.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source: output_names, https://onnxruntime.ai/docs/api/python/api_summary.html, where None means all outputs; lists
# are names.
# Expected by most: no names, no outputs, as any other list returns one output for each name.
# Observed: the wrapper tests the list for truth, so that [] means None. Code that collects names from a request must
# treat the empty list itself, or it computes, copies and returns every output.
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
    [helper.make_node("Neg", ["x"], ["minus"]), helper.make_node("Abs", ["x"], ["size"])],
    [("x", TensorProto.FLOAT, ["n"])],
    [("minus", TensorProto.FLOAT, None), ("size", TensorProto.FLOAT, None)],
)
feeds = {"x": np.array([1, -2], np.float32)}
counts = [len(run.run(names, feeds)) for names in (["minus"], None, [])]
print("outputs for one name, for None, for []:", *counts)
assert counts[:2] == [1, 2], "the control"
if counts[2] != 2:
    raise SystemExit("an empty list returns no output: the behaviour is no longer there")
PYTHON
