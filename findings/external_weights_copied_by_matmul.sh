#!/usr/bin/env bash
# Weights in an external file are mapped into memory and shared where Gather reads them, and copied where MatMul does.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2, Linux.
# Source: session.disable_prepacking in
# https://github.com/microsoft/onnxruntime/blob/main/include/onnxruntime/core/session/onnxruntime_session_options_config_keys.h
# Expected by most: external data is memory-mapped, so sessions and processes over one file share its pages, or nothing
# is mapped and each session has a copy.
# Observed: it depends on the operator. Two sessions over one file of 64 MiB own 2 MiB where Gather reads it, and 130
# MiB where MatMul does, which packs a copy for each session. With session.disable_prepacking=1 MatMul shares it too.
# Weights inside the model file are always copied. Servers with one process for each core pay for the products once per
# process.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cd "$work"
ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - <<'PYTHON'
import subprocess
import sys

import numpy as np
from onnx import TensorProto, helper, numpy_helper

size = 4096
weight = np.random.default_rng(0).random((size, size), dtype=np.float32)
megabytes = weight.nbytes >> 20
weight.tofile("weight.bin")
MEASURE = """
import sys
import onnxruntime as ort

def owned():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("RssAnon"))

options = ort.SessionOptions()
options.add_session_config_entry("session.disable_prepacking", sys.argv[1])
before = owned()
sessions = [ort.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"]) for _ in range(2)]
print(owned() - before)
"""


def owned(operator, external=True, prepacking=True):
    """Return the memory that two sessions over one file do not share, in MiB."""
    tensor = numpy_helper.from_array(weight, "w")
    if external:
        location = {"location": "weight.bin", "offset": "0", "length": str(weight.nbytes)}
        tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=weight.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in location.items():
            tensor.external_data.add(key=key, value=value)
    if operator == "Gather":
        node, entry = helper.make_node("Gather", ["w", "x"], ["y"]), (TensorProto.INT64, ["batch"])
    else:
        node, entry = helper.make_node("MatMul", ["x", "w"], ["y"]), (TensorProto.FLOAT, ["batch", size])
    value = helper.make_tensor_value_info("x", *entry)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", size])
    graph = helper.make_graph([node], "finding", [value], [output], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    with open("model.onnx", "wb") as file:
        file.write(model.SerializeToString())
    command = [sys.executable, "-c", MEASURE, "0" if prepacking else "1"]
    found = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    place = "external" if external else "inside"
    print(f"{operator}, {place}, prepacking {prepacking}: two sessions own {found} MiB of a weight of {megabytes} MiB")
    return found


assert owned("Gather") < megabytes // 2, "the control: Gather"
assert owned("MatMul", prepacking=False) < megabytes // 2, "the control: MatMul without prepacking"
assert owned("Gather", external=False) > megabytes, "the control: weights inside the file"
if owned("MatMul") < megabytes:
    raise SystemExit("the weight is shared: the behaviour is no longer there")
PYTHON
