#!/usr/bin/env bash
# torch.onnx.export writes an invalid file without an error when an output's name is that of a value inside the graph.
#
# Versions: torch 2.13.0 (CPU), onnx 1.23.2, onnxruntime 1.32.0, onnxscript 0.7.2.
# Source: output_names, https://docs.pytorch.org/docs/stable/onnx_export.html;
# https://github.com/pytorch/pytorch/issues/158094
# Expected by most: names of outputs are the caller's to choose, and the exporter renames its own values.
# Observed: values inside are called after the operators that make them ("embedding", "softmax", "add"), which are the
# obvious names for outputs too. The export succeeds, and two nodes write a value of that name: onnx's checker and
# onnxruntime refuse the file. With another name the same module exports and runs. dynamo=False renames the inner
# value.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 onnxscript==0.7.2 torch==2.13.0
cd "$work"
ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - <<'PYTHON'
import io
import logging
import warnings

import onnx
import onnxruntime as ort
import torch

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(5, 4)

    def forward(self, ids):
        return torch.tanh(self.table(ids))


def export(name, dynamo):
    ids = torch.zeros(2, 3, dtype=torch.int64)
    options = {"input_names": ["ids"], "output_names": [name], "dynamo": dynamo, "verbose": False}
    if dynamo:
        return torch.onnx.export(Encoder().eval(), (ids,), **options).model_proto
    file = io.BytesIO()
    torch.onnx.export(Encoder().eval(), (ids,), file, **options)
    return onnx.load_from_string(file.getvalue())


def refusals(model):
    found = []
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        found.append(f"checker: {str(error).strip().splitlines()[0]}")
    try:
        ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:
        found.append(f"onnxruntime: {str(error).strip().splitlines()[0]}")
    return found


assert not refusals(export("vectors", dynamo=True)), "the control: another name"
assert not refusals(export("embedding", dynamo=False)), "the control: the older exporter"
model = export("embedding", dynamo=True)
print("written:", [(node.op_type, list(node.output)) for node in model.graph.node])
found = refusals(model)
print(*found, sep="\n")
if not found:
    raise SystemExit("the file is valid: the behaviour is no longer there")
assert len(found) == 2, found
PYTHON
