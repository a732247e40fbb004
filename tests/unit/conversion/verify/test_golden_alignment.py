"""Golden answers find a provider that aligns queries and keys in another way than the one that they were made on.

Golden answers are stored sequences and answers of a bundle. Each test converts a graph, changes its alignment as
another provider might, and expects GoldenMismatch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.parser
import pytest
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.engine.golden import GoldenMismatch, read_golden, verify_golden
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.repository import MODEL_FILE, Bundle

VALUES = "float[batch, T, 8]"


def bundle_of(attributes: str, keys: str, folder: Path) -> Bundle:
    """Convert a graph of one Attention of queries (batch, seq, 8) over keys along the axis `keys`."""
    given = f"{VALUES.replace('T', 'seq')} x" + (f", {VALUES.replace('T', keys)} z" if keys != "seq" else "")
    source = "z" if keys != "seq" else "x"
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 25]> g ({given}) => (float[batch, seq, 8] y) {{'
        f" y = Attention<q_num_heads = 2, kv_num_heads = 2, {attributes}>(x, {source}, {source}) }}"
    )
    onnx.save(model, folder / "graph.onnx")
    request = PrepareRequest(
        name="aligned", repository=folder / "models", file=folder / "graph.onnx", max_length=48, fuse=False
    )
    return prepare_bundle(request)


def from_the_last_key(model: onnx.ModelProto, attention: onnx.NodeProto) -> None:
    """Align the last query with the last key, where the operator aligns the first ones."""
    keys = attention.input[1]
    nodes = onnx.parser.parse_graph(
        f"g (float[b, t, 8] {keys}) => (int64[b] counts) {{ rows = Shape<start = 0, end = 1>({keys})"
        f" length = Shape<start = 1, end = 2>({keys}) counts = Expand(length, rows) }}"
    ).node
    at = list(model.graph.node).index(attention)
    for node in reversed(nodes):
        model.graph.node.insert(at, node)
    attention.input.extend([""] * (6 - len(attention.input)))
    attention.input.append("counts")


def wider(_: onnx.ModelProto, attention: onnx.NodeProto) -> None:
    """Let each query attend to one more key."""
    next(each for each in attention.attribute if each.name == "left_window_size").i += 1


@pytest.mark.parametrize(
    ("attributes", "keys", "change"),
    [
        ("is_causal = 1", "frames", from_the_last_key),
        ("is_causal = 1, left_window_size = 20", "seq", wider),
    ],
    ids=["causal over another axis", "a window of more than the shortest lengths"],
)
def test_another_alignment_is_refused_with_the_provider_and_the_difference(
    attributes: str, keys: str, change: Callable[[onnx.ModelProto, onnx.NodeProto], None], tmp_path: Path
) -> None:
    bundle = bundle_of(attributes, keys, tmp_path)
    session = RuntimeSession.load(bundle.path / MODEL_FILE, provider="CPUExecutionProvider")
    # The same kernels: at most the order of sums differs.
    assert verify_golden(session, bundle.manifest, read_golden(bundle)) < 1e-2
    model = onnx.load(bundle.path / MODEL_FILE)
    change(model, next(node for node in model.graph.node if node.op_type == "Attention"))
    onnx.save(model, tmp_path / "other.onnx")
    other = RuntimeSession.load(tmp_path / "other.onnx", provider="CPUExecutionProvider")
    with pytest.raises(GoldenMismatch, match=r"output y is off by \S+ .* on CPUExecutionProvider") as why:
        verify_golden(other, bundle.manifest, read_golden(bundle))
    assert why.value.metadata()["provider"] == "CPUExecutionProvider"
    assert why.value.error > 10 * why.value.allowed


def test_causal_site_with_a_mask_is_checked_also_where_sequences_run_alone(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23]> g (float[batch, seq, 8] x, int64[batch, seq] attention_mask)'
        " => (float[batch, seq, 8] y) <int64[2] axes = {1, 2}> {"
        " kept = Cast<to = 9>(attention_mask) mask = Unsqueeze(kept, axes)"
        " y = Attention<q_num_heads = 2, kv_num_heads = 2, is_causal = 1>(x, x, x, mask) }"
    )
    onnx.save(model, tmp_path / "graph.onnx")
    request = PrepareRequest(
        name="masked", repository=tmp_path / "models", file=tmp_path / "graph.onnx", max_length=48, fuse=False,
        batching="off", attack_seconds=0,
    )  # fmt: skip
    bundle = prepare_bundle(request)
    manifest, golden = bundle.manifest.under("off"), read_golden(bundle)
    (site,) = manifest.sites
    assert (site.kind, site.available, manifest.max_batch_size) == ("causal", True, 1)
    assert [sequence.inputs["attention_mask"].tolist() for sequence in golden][-1] == [1] * 6 + [0] * 2
    assert golden[-1].weights[0].reshape(2, 8, 8)[:, 7, 6:].tolist() == [[0, 0]] * 2, "the tap reads the mask"
    session = RuntimeSession.load(bundle.path / MODEL_FILE, provider="CPUExecutionProvider")
    assert verify_golden(session, manifest, golden) < 1e-2
    changed = onnx.load(bundle.path / MODEL_FILE)
    next(node for node in changed.graph.node if node.op_type == "Attention").input[3] = ""
    onnx.save(changed, tmp_path / "other.onnx")
    other = RuntimeSession.load(tmp_path / "other.onnx", provider="CPUExecutionProvider")
    with pytest.raises(GoldenMismatch, match=r"output y is off by \S+ .* on CPUExecutionProvider"):
        verify_golden(other, manifest, golden)
