#!/usr/bin/env bash
# torch.onnx.export with dynamo=False puts every submodule into the mode of the outermost module.
#
# Versions: torch 2.13.0 (CPU), onnx 1.23.2.
# Source: training, https://docs.pytorch.org/docs/stable/onnx_export.html;
# https://github.com/pytorch/pytorch/issues/52867
# Expected by most: an export reads a module; or, as the exporter switches to eval mode and back, it restores what it
# found.
# Observed: only the outermost flag is remembered and given back by train(mode), which sets it in all submodules. A
# BatchNorm that was frozen with eval() inside a module in training is in training after the export, so that it starts
# to change its statistics; in the other direction a Dropout that was left on is off. dynamo=True leaves modes as they
# are.
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

import torch

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


def frozen():
    """A module in training whose normalization was frozen, as for fine-tuning."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    module.train()
    module[1].eval()
    return module


def after(dynamo):
    module, x = frozen(), torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    torch.onnx.export(module, (x,), io.BytesIO(), dynamo=dynamo, verbose=False)
    statistics = module[1].running_mean.clone()
    module(x)
    return module[1].training, not torch.equal(statistics, module[1].running_mean)


assert not frozen()[1].training
for dynamo in (True, False):
    training, moved = after(dynamo)
    print(f"after dynamo={dynamo}: BatchNorm in training {training}, its statistics change {moved}")
    if dynamo:
        assert (training, moved) == (False, False), "the control: the newer exporter leaves it frozen"
    elif not training:
        raise SystemExit("the older exporter restores the mode: the behaviour is no longer there")
    else:
        assert moved
PYTHON
