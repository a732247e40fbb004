#!/usr/bin/env bash
# Zeros appended at the right end change the first output of a strided convolution with auto_pad SAME_UPPER.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2; the same in onnx's reference evaluator.
# Source: attribute auto_pad, https://onnx.ai/onnx/operators/onnx__Conv.html
# Expected by most: a convolution with padding of zeros does not care whether zeros come from the batch or from itself,
# so padding at the end leaves the outputs of the sequence's own windows as they are.
# Observed: the total padding depends on the length, and is split between both ends. With kernel 3 and stride 2 a
# length of 7 is padded by one zero on the left, a length of 8 by none, so that all windows move by one position.
# Explicit pads do not have the effect.
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


from onnx.reference import ReferenceEvaluator

x = np.arange(1, 8, dtype=np.float32).reshape(1, 1, 7)
longer = np.pad(x, ((0, 0), (0, 0), (0, 1)))
kernel = {"w": np.array([[[1, 10, 100]]], np.float32)}
inputs, outputs = [("x", TensorProto.FLOAT, ["batch", 1, "length"])], [("y", TensorProto.FLOAT, None)]
found = {}
for name, attributes in {"SAME_UPPER": {"auto_pad": "SAME_UPPER"}, "explicit pads": {"pads": [1, 1]}}.items():
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2], **attributes)
    run = session([node], inputs, outputs, kernel)
    reference = ReferenceEvaluator(node)
    answers = []
    for given in (x, longer):
        answer = run.run(None, {"x": given})[0]
        assert np.array_equal(answer, reference.run(None, {"x": given, **kernel})[0])
        answers.append(answer.ravel())
    print(f"{name}: alone {answers[0]}, with one zero appended {answers[1]}")
    found[name] = float(np.abs(answers[0][:3] - answers[1][:3]).max())
assert found["SAME_UPPER"] > 0 and found["explicit pads"] == 0, found
PYTHON
