#!/usr/bin/env bash
# A mask (batch, queries, keys) of the standard Attention is read as one per head, in some batches without an error.
#
# Versions: onnxruntime 1.32.0 (CPU), onnx 1.23.2.
# Source: attn_mask, "broadcastable to (batch_size, q_num_heads, q_sequence_length, total_sequence_length)",
# https://onnx.ai/onnx/operators/onnx__Attention.html
# Expected by most: a mask (batch, queries, keys), with one triangle or one padding per sequence, either works or is
# refused.
# Observed: by the rules of broadcasting its first axis is that of heads. A batch of another size than the number of
# heads is refused at the run. In a batch of as many sequences as heads, the mask of sequence 0 hides keys from head 0
# of every sequence: keys of padding are visible, and own keys are hidden. The same mask as (batch, 1, queries, keys)
# is right.
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


def attention(heads, rank):
    shape = ["batch", "queries", "keys"] if rank == 3 else ["batch", 1, "queries", "keys"]
    inputs = [("q", TensorProto.FLOAT, ["batch", heads, "queries", 8])]
    inputs += [(name, TensorProto.FLOAT, ["batch", heads, "keys", 8]) for name in "kv"]
    inputs += [("mask", TensorProto.BOOL, shape)]
    node = helper.make_node("Attention", ["q", "k", "v", "mask"], ["y"])
    output = ("y", TensorProto.FLOAT, ["batch", heads, "queries", 8])
    return session([node], inputs, [output], opset=23)


rng = np.random.default_rng(0)
batch, length = 2, 5
mask = np.ones((batch, length, length), bool)
mask[0, :, 3:] = False  # the last two keys of sequence 0 are padding
errors = {}
for heads in (2, 4):
    feeds = {name: rng.normal(size=(batch, heads, length, 8)).astype(np.float32) for name in "qkv"}
    right = attention(heads, 4).run(None, {**feeds, "mask": mask[:, None]})[0]
    moved = {**feeds, "k": feeds["k"].copy(), "mask": mask[:, None]}
    moved["k"][0, :, 3:] += 1
    assert np.array_equal(attention(heads, 4).run(None, moved)[0], right), "the control: four axes hide the padding"
    try:
        found = attention(heads, 3).run(None, {**feeds, "mask": mask})[0]
    except Exception:
        print(f"{batch} sequences, {heads} heads: refused at the run")
        errors[heads] = None
    else:
        errors[heads] = np.abs(found - right).max(axis=(2, 3))
        print(f"{batch} sequences, {heads} heads: errors of sequences and heads", errors[heads].round(2).tolist())
assert errors[4] is None, "a batch of another size than the heads runs"
if errors[2] is None or errors[2].max() < 0.1:
    raise SystemExit("the mask is not read as heads: the behaviour is no longer there")
# Head 1 of sequence 0 attends to padding, and head 0 of sequence 1 has lost two of its keys.
assert (errors[2] > 0.1).tolist() == [[False, True], [True, False]]
PYTHON
