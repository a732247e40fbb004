"""Counts of masks: replaced by the mask where the operator takes it whole, else reported with the operator.

onnxruntime's optimizer gives attention only how many ones a mask has. `counted` and `with_count` make such graphs.
`with_whole_masks` returns the rewritten graph and what it found; nothing raises.
"""

from __future__ import annotations

import onnx
import pytest
from attnserve_server.conversion.rewrite.counted_masks import with_whole_masks
from counted_graphs import counted


def with_count(operator: str, inputs: str, *, opset: int = 24, behind: str = "count32 = Cast <to = 6> (count)"):
    """A graph whose attention operator takes the count of `attention_mask` as `count32`."""
    return onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]>
        g (float[batch, seq, 8] x, int64[batch, seq] attention_mask, float[batch, 2, past, 4] old)
        => (float[batch, seq, 8] y)
        <int64[1] axes = {{1}}, int64[1] one = {{1}}, float[8, 24] w, int32 total = {{5}}> {{
            count = ReduceSum <keepdims = 0> (attention_mask, axes)
            {behind}
            y = {operator} ({inputs})
        }}"""
    )


@pytest.mark.parametrize("form", ["Attention", "MultiHeadAttention", "EmbedLayerNormalization"])
def test_operator_that_takes_masks_reads_the_whole_mask(form: str) -> None:
    proto, found = with_whole_masks(onnx.shape_inference.infer_shapes(counted(form)))
    attention = proto.graph.node[-1]
    sources = {output: node for node in proto.graph.node for output in node.output}
    mask = next(sources[name] for name in attention.input if name in sources and sources[name].op_type == "Cast")
    assert list(mask.input) in (["attention_mask"], ["mask"])
    assert found.restored == ("attention_mask",)
    assert not found.kept
    assert not any(node.op_type == "ReduceSum" for node in proto.graph.node)


@pytest.mark.parametrize(
    ("operator", "inputs", "behind"),
    [
        ("com.microsoft.Attention <num_heads = 2>", 'x, w, "", count32, old', "count32 = Cast <to = 6> (count)"),
        (
            "com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 2>",
            'x, x, x, "", "", count32, total',
            "less = Sub (count, one) count32 = Cast <to = 6> (less)",
        ),
        ("Attention <q_num_heads = 2, kv_num_heads = 2>", 'x, x, x, "", "", "", count', ""),
    ],
)
def test_count_of_an_operator_that_cannot_take_the_mask_is_reported(operator: str, inputs: str, behind: str) -> None:
    source = onnx.shape_inference.infer_shapes(with_count(operator, inputs, behind=behind))
    proto, found = with_whole_masks(source)
    assert proto is source
    assert found.restored == ()
    assert found.kept == {"attention_mask": operator.partition(" ")[0].rpartition(".")[2]}


def test_sum_of_other_numbers_is_left_alone() -> None:
    """Twice a mask counts no ones: the first `2 n` keys are what such a graph means."""
    model = counted("Attention")
    double = onnx.helper.make_node("Add", ["mask", "mask"], ["double"])
    model.graph.node.insert(1, double)
    next(node for node in model.graph.node if node.op_type == "ReduceSum").input[0] = "double"
    source = onnx.shape_inference.infer_shapes(model)
    proto, found = with_whole_masks(source)
    assert proto is source
    assert (found.restored, dict(found.kept)) == ((), {})
