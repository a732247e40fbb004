#!/usr/bin/env bash
# The standard LinearAttention fails on a batch without rows; onnxruntime's operator of the same name runs it.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source: https://onnx.ai/onnx/operators/onnx__LinearAttention.html, which sets no least batch size.
# Expected by most: both operators return no rows, as MatMul, Softmax and Attention do.
# Observed: the runtime has no kernel for the standard operator and writes out its definition, whose Reshape copies the
# size 0 of the batch as "keep this axis". Every run without rows fails. A server that computes something for the
# selected rows only must use the operator of com.microsoft.
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


inputs = [(name, TensorProto.FLOAT, ["batch", "seq", 8]) for name in "qkv"]
outputs = [("y", TensorProto.FLOAT, None)]
attributes = {"q_num_heads": 2, "kv_num_heads": 2, "update_rule": "linear"}
results = []
for domain in ("", "com.microsoft"):
    node = helper.make_node("LinearAttention", list("qkv"), ["y", "state"], domain=domain, **attributes)
    kernel = session([node], inputs, outputs, opset=27)
    feeds = {name: np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32) for name in "qkv"}
    results.append(kernel.run(["y"], feeds)[0])
    try:
        shape = kernel.run(["y"], {name: array[:0] for name, array in feeds.items()})[0].shape
        print(f"{domain or 'ai.onnx'}: no rows give {shape}")
        failed = False
    except Exception as fault:
        print(f"{domain or 'ai.onnx'}:", " ".join(str(fault).split())[:110])
        failed = True
    if failed is not (domain == ""):
        raise SystemExit("the behaviour is no longer there")
assert np.abs(results[0] - results[1]).max() < 1e-5, "the two operators differ on two rows"
PYTHON
