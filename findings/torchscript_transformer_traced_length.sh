#!/usr/bin/env bash
# torch's older exporter writes nn.TransformerEncoder with dynamic axes declared and the traced length inside.
#
# Versions: torch 2.13.0 (CPU), onnx 1.23.2, onnxruntime 1.32.0.
# Source: dynamic_axes and dynamo, https://docs.pytorch.org/docs/stable/onnx_export.html
# Expected by most: an axis in dynamic_axes may have any size, as with attention written with matmul and
# softmax; or the export raises.
# Observed: nn.MultiheadAttention reads sizes as Python numbers, so that Reshape nodes hold the traced length. The file
# declares (batch, seq), loads, and runs any batch at the traced length; every other length fails. A test at the length
# of the example finds nothing. The default exporter (dynamo) writes a file for all lengths.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 torch==2.13.0
cd "$work"
ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - <<'PYTHON'
import io
import logging
import warnings

import numpy as np
import onnxruntime as ort
import torch

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
torch.manual_seed(0)
TRACED = 7


class Written(torch.nn.Module):
    """The control: attention of one head, written with matmul and softmax."""

    def __init__(self):
        super().__init__()
        self.projection = torch.nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.projection(x).chunk(3, dim=-1)
        return torch.softmax(q @ k.transpose(1, 2) / 4, dim=-1) @ v


def session(encoder):
    """Export an encoder with dynamic axes of batch and sequence, and load the file."""
    axes = {name: {0: "batch", 1: "seq"} for name in "xy"}
    names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": axes}
    file = io.BytesIO()
    torch.onnx.export(encoder, (torch.zeros(3, TRACED, 16),), file, opset_version=18, dynamo=False, **names)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    loaded = ort.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    assert loaded.get_inputs()[0].shape == ["batch", "seq", 16]
    return loaded


def runs(encoder, loaded, batch, length):
    x = torch.randn(batch, length, 16)
    try:
        found = loaded.run(None, {"x": x.numpy()})[0]
    except Exception as error:
        print(f"batch {batch}, length {length}:", str(error).strip()[-130:].replace("\n", " "))
        return False
    with torch.no_grad():
        assert np.abs(found - encoder(x).numpy()).max() < 1e-4, "the answers differ from torch's"
    print(f"batch {batch}, length {length}: runs")
    return True


written = Written().eval()
exported = session(written)
print("attention written with matmul:")
assert all(runs(written, exported, 2, length) for length in (TRACED, 5)), "the control: attention written with matmul"
layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
encoder = torch.nn.TransformerEncoder(layer, 1).eval()
exported = session(encoder)
print("nn.TransformerEncoder:")
assert all(runs(encoder, exported, batch, TRACED) for batch in (2, 4)), "the control: the traced length"
if runs(encoder, exported, 2, 5):
    raise SystemExit("other lengths run: the behaviour is no longer there")
PYTHON
