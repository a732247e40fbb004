#!/usr/bin/env bash
# Static quantization to integer operators writes a file that does not load where a convolution's bias is read twice.
#
# Versions: onnxruntime 1.32.0, onnx 1.23.2.
# Source: QOperator format, https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
# Expected by most: a bias that another node also reads is quantized for each reader, or left in float for the second.
# Observed: the bias becomes int32, once, and QLinearAdd gets the int32 tensor, a type that it does not have. The
# quantizer reports nothing; the session refuses the file. Exporters that merge equal constants, such as several biases
# of zeros, make such graphs. With a separate constant for the second reader, or in QDQ format, the same model runs.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cd "$work"
ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - <<'PYTHON'
import logging

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

logging.disable(logging.WARNING)
rng = np.random.default_rng(0)
x = rng.normal(size=(1, 3, 8, 8)).astype(np.float32)


class Reader(CalibrationDataReader):
    def __init__(self):
        self.left = [{"x": x}]

    def get_next(self):
        return self.left.pop() if self.left else None


def runs(added, form):
    """Quantize a convolution by patches and the addition of a constant, as vision models begin, and run the file."""
    bias = rng.normal(size=4).astype(np.float32)
    constants = {"w": rng.normal(size=(4, 3, 4, 4)).astype(np.float32), "bias": bias, "shape": np.array([0, 4, -1])}
    if added != "bias":
        constants[added] = bias
    nodes = [
        helper.make_node("Conv", ["x", "w", "bias"], ["patches"], strides=[4, 4]),
        helper.make_node("Reshape", ["patches", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["tokens"], perm=[0, 2, 1]),
        helper.make_node("Add", ["tokens", added], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "finding",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 4])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "model.onnx")
    types = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
    quantize_static("model.onnx", "quantized.onnx", Reader(), quant_format=form, **types)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession("quantized.onnx", options, providers=["CPUExecutionProvider"])
        session.run(None, {"x": x})
    except Exception as error:
        print(f"{form.name}, Add reads {added}:", str(error).splitlines()[0][-130:])
        return False
    print(f"{form.name}, Add reads {added}: runs")
    return True


assert runs("own", QuantFormat.QOperator), "the control: a separate constant"
assert runs("bias", QuantFormat.QDQ), "the control: QDQ"
if runs("bias", QuantFormat.QOperator):
    raise SystemExit("the file runs: the behaviour is no longer there")
PYTHON
