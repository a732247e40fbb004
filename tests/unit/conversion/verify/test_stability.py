"""A conversion warns of a file whose outputs differ with and without onnxruntime's optimizers.

A difference of at most 1/127 of the greatest number of an output, one step of 8 bits, is no reason. The files have
constant quantizers, whose rounding the optimizers change by a step of 0.003. `warnings_of` converts a file and returns
the warnings about that. A refused conversion raises BuildRefused.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.parser
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle

BODY = """<ir_version: 8, opset_import: ["": 17]> shares (float[batch, seq, 16] x) => (float[batch, seq, 16] y)
<float s = {0.05}, uint8 z = {100}, float step = {0.003}, uint8 none = {0}> {
    q = QuantizeLinear(x, s, z) p = DequantizeLinear(q, s, z)
    w = Softmax(p) r = QuantizeLinear(w, step, none) v = DequantizeLinear(r, step, none)
"""
# The runtime fuses the softmax to QLinearSoftmax, which rounds some shares down by a step.
ROUNDED = BODY + "y = Identity(v) }"
# What remains of a share without its float form is at most half a step, so that a step counts.
REMAINDER = BODY + "o = DequantizeLinear(q, s, z) f = Softmax(o) y = Sub(v, f) }"


def warnings_of(body: str, folder: Path) -> list[str]:
    onnx.save(onnx.parser.parse_model(body), folder / "model.onnx")
    warnings: list[str] = []
    steps = Steps.silent()
    steps.warn = warnings.append  # type: ignore[method-assign]
    request = PrepareRequest(
        file=folder / "model.onnx", name="tiny", repository=folder / "models", max_length=16, attack_seconds=0
    )
    prepare_bundle(request, steps)
    return [warning for warning in warnings if "differs from itself" in warning]


def test_difference_beyond_a_step_of_the_greatest_output_is_a_warning(tmp_path: Path) -> None:
    (warning,) = warnings_of(REMAINDER, tmp_path)
    assert "with and without the runtime's optimizers" in warning


def test_difference_of_a_step_is_none(tmp_path: Path) -> None:
    assert warnings_of(ROUNDED, tmp_path) == []
