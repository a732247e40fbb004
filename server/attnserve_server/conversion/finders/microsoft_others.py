"""Lists onnxruntime's attention operators that no tap knows, each with its reason, so that nobody looks for them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from attnserve_server.conversion.base.sites import FoundSite, Untappable
from attnserve_server.conversion.finders.microsoft_nodes import nodes_of

_TOKENS = "it works on the tokens of all sequences in one row: its first axis is not the batch"
_STEP = "it decodes one token at a time over a cache: weights over a cache are not tapped"
_BLOCKS = "it attends to blocks of keys over a cache: sparse attention over a cache is not tapped"

_REASONS = {
    "DecoderAttention": "its axes and masks depend on inputs of the run, and its first axis is not the batch",
    "DecoderMaskedMultiHeadAttention": _STEP,
    "DecoderMaskedSelfAttention": _STEP,
    "DynamicSparseAttention": _BLOCKS,
    "LinearAttention": "it keeps a state in place of weights, and no kernel of queries and keys to imply them",
    "LongformerAttention": "it attends within a window, on GPUs only: it does not run where taps are checked",
    "PackedAttention": _TOKENS,
    "PackedMultiHeadAttention": _TOKENS,
    "PagedAttention": _TOKENS,
    "QOrderedAttention": "its integers are ordered for GPUs: it does not run where taps are checked",
    "QOrderedLongformerAttention": "its integers are ordered for GPUs: it does not run where taps are checked",
    "SparseAttention": _BLOCKS,
    "SparsePagedAttention": _TOKENS,
}


def find(graph: ir.Graph) -> Iterator[FoundSite]:
    """All nodes of such operators, in subgraphs too."""
    for node in nodes_of(graph, *_REASONS):
        heads = max(node.attributes.get_int("num_heads", 1), 1)
        kv_heads = max(node.attributes.get_int("kv_num_heads", heads), 1)
        operator = f"com.microsoft.{node.op_type}-1"
        yield FoundSite(node, operator, heads, kv_heads, 0, Untappable(_REASONS[node.op_type]))
