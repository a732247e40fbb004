#!/usr/bin/env bash
# tf2onnx writes a Keras model with exact gelu as a file that no ONNX runtime can load, and reports success.
#
# Versions: keras 3.15.1, tensorflow 2.21.0, tf2onnx 1.17.0, onnx 1.23.2.
# Source: list of supported TensorFlow operators, https://github.com/onnx/tensorflow-onnx/blob/main/support_status.md
# Expected by most: `convert.from_keras` and `from_function` raise for an operator that they cannot convert.
# Observed: Keras computes activation="gelu" by the TensorFlow operator Erfc, which tf2onnx does not know. It logs two
# lines, returns normally, and leaves a node of type Erfc in the default domain, where no such operator exists. The
# checker of onnx, and every runtime, refuse the file later. With approximate=True (tanh) the file is whole.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    keras==3.15.1 tensorflow==2.21.0 tf2onnx==1.17.0 onnx==1.23.2
cd "$work"
TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES= KERAS_BACKEND=tensorflow "$work/venv/bin/python" - <<'PYTHON'
import keras
import onnx
import tensorflow as tf
import tf2onnx


def operators(activation):
    """Convert one layer, and return its operators and the checker's verdict."""
    layer = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation=activation)])
    function = tf.function(lambda x: layer(x))
    proto, _ = tf2onnx.convert.from_function(function, [tf.TensorSpec((None, 4), tf.float32, "x")], opset=17)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except onnx.checker.ValidationError as error:
        return [node.op_type for node in proto.graph.node], str(error).splitlines()[0]
    return [node.op_type for node in proto.graph.node], "valid"


for name, activation in (("relu", "relu"), ("tanh", lambda x: keras.activations.gelu(x, approximate=True))):
    found, verdict = operators(activation)
    print(f"{name}: {found}, {verdict}")
    assert verdict == "valid", f"the control: {name}"
found, verdict = operators("gelu")
print(f"gelu: {found}, {verdict}")
if "Erfc" not in found or "No Op registered for Erfc" not in verdict:
    raise SystemExit("the file is whole: the behaviour is no longer there")
PYTHON
