#!/usr/bin/env bash
# A model that is loaded from bytes takes its external weights from the working directory, whichever files lie there.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source: https://onnx.ai/onnx/repo-docs/ExternalData.html (locations are relative to the model's file);
# https://github.com/microsoft/onnxruntime/issues/6696, https://github.com/microsoft/onnxruntime/pull/27430
# Expected by most: bytes have no place, so a model with external data is refused unless a folder is named.
# Observed: locations are resolved in the working directory. The same bytes compute x in one directory and 2x in
# another whose file has the same name and size, as "model.onnx.data" usually has; elsewhere the load fails. Loaded by
# its path, the model takes the file beside it from every directory.
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


import os
import pathlib

size = 64


def save(folder, factor):
    """A model that multiplies by `factor`, with its weights in another file."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "scaled",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", size])],
        [numpy_helper.from_array((factor * np.eye(size)).astype(np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    pathlib.Path(folder).mkdir()
    path = pathlib.Path(folder, "model.onnx").absolute()
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return path


def value(model):
    run = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return float(run.run(None, {"x": np.ones((1, size), np.float32)})[0][0, 0])


one, two = save("one", 1), save("two", 2)
start = pathlib.Path.cwd()
found = {}
for folder in ("one", "two"):
    os.chdir(start / folder)
    found[folder] = (value(one.read_bytes()), value(str(one)))
    print(f"working directory {folder!r}: from bytes {found[folder][0]}, by path {found[folder][1]}")
os.chdir(start)
assert [by_path for _, by_path in found.values()] == [1, 1], "the control: by path, always its own weights"
assert found["one"][0] == 1
if found["two"][0] != 2:
    raise SystemExit("bytes no longer take weights from the working directory: the behaviour is no longer there")
PYTHON
