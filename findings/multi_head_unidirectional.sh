#!/usr/bin/env bash
# A causal MultiHeadAttention with fewer queries than keys: the last attends to all, the others count from the first.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source: unidirectional,
# https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MultiHeadAttention
# Expected by most: one triangle, either at the top left (1, 2 and 3 of 5 keys for 3 queries) as in the standard
# Attention, or at the bottom right (3, 4 and 5 keys).
# Observed: 3 queries attend to 1, 2 and 5 keys. With as many queries as keys the mask is a plain triangle, and one
# query alone attends to every key, so that neither a prompt nor decoding token by token shows it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cd "$work"
ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper


def session(nodes, inputs, outputs, constants=None, opset=17, **config):
    """A CPU session over a small graph; inputs and outputs are (name, type, shape)."""
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


def attended(operator, queries, keys):
    """Return how many keys each query attends to: those whose value moves its output."""
    inputs = [("q", TensorProto.FLOAT, ["batch", "queries", 16])]
    inputs += [(name, TensorProto.FLOAT, ["batch", "keys", 16]) for name in "kv"]
    attributes = {"domain": "com.microsoft", "num_heads": 2, "unidirectional": 1}
    if operator == "Attention":
        attributes = {"q_num_heads": 2, "kv_num_heads": 2, "is_causal": 1}
    node = helper.make_node(operator, list("qkv"), ["y"], **attributes)
    kernel = session([node], inputs, [("y", TensorProto.FLOAT, ["batch", "queries", 16])], opset=23)
    rng = np.random.default_rng(0)
    feeds = {name: rng.normal(size=(1, keys, 16)).astype(np.float32) for name in "qkv"}
    feeds["q"] = feeds["q"][:, :queries]
    own = kernel.run(None, feeds)[0]
    counts = np.zeros(queries, int)
    for key in range(keys):
        moved = feeds["v"].copy()
        moved[:, key] += 1
        counts += np.abs(kernel.run(None, {**feeds, "v": moved})[0] - own).max(axis=(0, 2)) > 1e-6
    print(f"{operator}, {queries} queries and {keys} keys: attended {counts.tolist()}")
    return counts.tolist()


assert attended("MultiHeadAttention", 5, 5) == [1, 2, 3, 4, 5], "the control: as many queries as keys"
assert attended("Attention", 3, 5) == [1, 2, 3], "the control: the standard operator"
found = attended("MultiHeadAttention", 3, 5)
if found in ([1, 2, 3], [3, 4, 5]):
    raise SystemExit("the mask is one triangle: the behaviour is no longer there")
assert found == [1, 2, 5]
PYTHON
