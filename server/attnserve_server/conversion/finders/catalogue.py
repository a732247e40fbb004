"""Which operators of ONNX and onnxruntime compute attention, and what a conversion does with each of them.

`FOUND` have a finder, `UNTAPPED` are listed as sites without weights, and a file with one `WITHOUT_KERNEL` is refused
by name, because conversions run on the CPU. `PARTS` compute no attention by themselves, although their names or
documents mention it. The tables hold for onnx 1.23 and onnxruntime 1.32; a test compares them with the installed
schemas. A site is a place in a graph that computes attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.sites import FoundSite, Untappable
from attnserve_server.conversion.finders.operator_nodes import MICROSOFT, microsoft_nodes
from attnserve_server.conversion.graphs.operators import PREVIEW, STANDARD, subgraphs_of

Table = Mapping[tuple[str, str], str]
"""By domain and operator."""
_ONNX: Final = ""

FOUND: Final[Table] = {
    (_ONNX, "Attention"): "opsets 23 to 28, with masks, `is_causal`, windows, `softcap`, `scale`, grouped heads and "
    "`nonpad_kv_seqlen`, or with a past",
    (_ONNX, "LinearAttention"): "opset 27, all update rules; a past state is listed without weights",
    (PREVIEW, "FlexAttention"): "served as its definition: the weights are those after `score_mod`, softmax and "
    "`prob_mod`",
    (MICROSOFT, "Attention"): "with every form of `mask_index`, a bias and `unidirectional`; a past is listed without "
    "weights",
    (MICROSOFT, "GroupQueryAttention"): "with rotation, windows, `softcap`, sinks, packed operands and a past",
    (MICROSOFT, "LinearAttention"): "all update rules; a past state is listed without weights",
    (MICROSOFT, "MultiHeadAttention"): "with masks, biases, `unidirectional` and a past",
    (MICROSOFT, "QAttention"): "as `Attention`, with integer projections; a past is listed without weights",
}
"""Operators whose weights a tap gives, and in which forms."""

_STEP = "it decodes one token at a time over a cache: weights over a cache are not tapped"
UNTAPPED: Final[Table] = {
    (MICROSOFT, "AttnLSTM"): "it attends at each step of a recurrence, and its weights are inside the operator",
    (MICROSOFT, "DecoderMaskedMultiHeadAttention"): _STEP,
    (MICROSOFT, "GatedDeltaNet"): "it starts from a state of earlier tokens, whose share is not a weight of any key",
    (MICROSOFT, "SparseAttention"): "it attends to blocks of keys over a cache: sparse attention over a cache is not "
    "tapped",
}
"""Operators that run on the CPU and that no tap supports, and why."""

_TOKENS = "it takes the tokens of all sequences in one row"
_GPU_LAYOUT = "its integers are ordered for GPUs"
WITHOUT_KERNEL: Final[Table] = {
    (_ONNX, "DisentangledAttention_TRT"): "it is a plug-in of TensorRT",
    (MICROSOFT, "DecoderAttention"): "its first axis is not the batch",
    (MICROSOFT, "DecoderMaskedSelfAttention"): "it decodes one token at a time over a cache",
    (MICROSOFT, "DynamicSparseAttention"): "it attends to selected keys of a cache",
    (MICROSOFT, "LongformerAttention"): "it attends within a window and to global tokens",
    (MICROSOFT, "Mamba2Verify"): "it takes the tokens of one sequence",
    (MICROSOFT, "PackedAttention"): _TOKENS,
    (MICROSOFT, "PackedMultiHeadAttention"): _TOKENS,
    (MICROSOFT, "PagedAttention"): _TOKENS,
    (MICROSOFT, "QOrderedAttention"): _GPU_LAYOUT,
    (MICROSOFT, "QOrderedLongformerAttention"): _GPU_LAYOUT,
    (MICROSOFT, "SparsePagedAttention"): _TOKENS,
}
"""Operators that the runtime has no kernel for on the CPU, and what they compute."""

_SELECTION = "it selects the keys that another operator attends to"
_CONVOLUTION = "a convolution of each channel over earlier positions"
PARTS: Final[Table] = {
    (_ONNX, "CausalConvWithState"): f"{_CONVOLUTION}; runs as onnxruntime's operator",
    (_ONNX, "RotaryEmbedding"): "a rotation of queries and keys",
    (_ONNX, "TensorScatter"): "it writes keys and values into a cache",
    (MICROSOFT, "CausalConvWithState"): _CONVOLUTION,
    (MICROSOFT, "GatedDeltaNetStateReplay"): "it moves a state",
    (MICROSOFT, "GatedRMSNorm"): "a normalization",
    (MICROSOFT, "LinearAttentionGate"): "it computes the decay of LinearAttention",
    (MICROSOFT, "PackedSparseAttentionIndexer"): _SELECTION,
    (MICROSOFT, "PackedSparseAttentionIndexerMerge"): _SELECTION,
    (MICROSOFT, "SparseAttentionIndexer"): _SELECTION,
}
"""Operators that compute no attention by themselves."""


def find_untapped(graph: ir.Graph) -> Iterator[FoundSite]:
    """Yield the sites of `UNTAPPED` and `WITHOUT_KERNEL`, those in subgraphs too."""
    reasons = {name: reason for (domain, name), reason in {**UNTAPPED, **_refusals()}.items() if domain == MICROSOFT}
    for node in microsoft_nodes(graph, *reasons):
        heads = max(node.attributes.get_int("num_heads", 1), 1)
        kv_heads = max(node.attributes.get_int("kv_num_heads", heads), 1)
        operator = f"com.microsoft.{node.op_type}-1"
        yield FoundSite(node, operator, heads, kv_heads, 0, Untappable(reasons[node.op_type]))


def refuse_without_kernel(proto: onnx.ModelProto, name: str) -> None:
    """Raise BuildRefused for an attention operator, in subgraphs too, that does not run on the CPU.

    Args:
        proto: a model without local functions.
        name: of the file.
    """
    refusals = _refusals()
    waiting = [proto.graph]
    while waiting:
        for node in waiting.pop().node:
            domain = _ONNX if node.domain in STANDARD else node.domain
            if (domain, node.op_type) in refusals:
                operator = f"{domain}.{node.op_type}" if domain else node.op_type
                raise BuildRefused(
                    f"{name} uses {operator}: {refusals[domain, node.op_type]}; "
                    "export it with MultiHeadAttention or the standard Attention"
                )
            waiting.extend(subgraphs_of(node))


def _refusals() -> dict[tuple[str, str], str]:
    return {key: f"{why}, and the runtime has no kernel for it on the CPU" for key, why in WITHOUT_KERNEL.items()}
