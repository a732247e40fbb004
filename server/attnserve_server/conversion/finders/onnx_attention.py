"""Find the `ai.onnx` operator `Attention`, whose newest version is of opset 25.

Source: ONNX operators, Attention-23 to Attention-25. onnxruntime's CPU kernel agrees with it on the order (scale,
softcap, mask, softmax), on causal masks and windows (both positions count from the first, with those of a past; under
`nonpad_kv_seqlen`, the last query stands at the last key that counts) and on fully masked rows (zeros). A node whose
weights cannot be given is yielded as a site (a place in a graph that computes attention) with `Untappable(reason)`.
`find` raises nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import onnx_ir as ir

from attnserve_server.conversion.base.sites import FoundSite, Mask, Operand, Scores, Untappable
from attnserve_server.conversion.finders.operator_nodes import (
    NotTappable,
    past_of,
    presents_of,
    refuse_subgraph,
    refuse_uneven_heads,
    required,
)
from attnserve_server.conversion.graphs.walk import input_of, is_standard
from attnserve_server.model.bands import SlidingBand

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
_MASK_RANKS = (2, 3, 4)
_PAST_KEY, _COUNTS = 4, 6
_VERSIONS = (23, 24, 25)
"""The opsets that define a version of the operator; later opsets keep the last one."""


def find(graph: ir.Graph) -> Iterator[FoundSite]:
    """Yield the sites of this operator, those in subgraphs too."""
    version = graph.opset_imports.get("", 0)
    for node in graph.all_nodes():
        if node.op_type == "Attention" and is_standard(node):
            yield _site(node, graph, node.version or version)


def _site(node: ir.Node, graph: ir.Graph, version: int) -> FoundSite:
    operator = f"ai.onnx.Attention-{max((each for each in _VERSIONS if each <= version), default=version)}"
    heads = kv_heads = 1
    head_dim = 0
    causal = node.attributes.get_int("is_causal", 0) == 1
    try:
        query = _operand(node, 0, "q_num_heads")
        heads = query.heads
        key = _operand(node, 1, "kv_num_heads")
        kv_heads = key.heads
        head_dim = _head_dim(query)
        _refuse_unsupported(node, graph, query, key)
        value = Operand(required(node, 2, "value"), kv_heads, query.packed)
        past = past_of(node, _PAST_KEY)
        if past is not None:
            key, value = presents_of(node, key, value)
        scores = Scores(
            query=query,
            key=key,
            value=value,
            output=Operand(node.outputs[0], heads, query.packed),
            head_dim=head_dim,
            scale=node.attributes.get_float("scale", 1.0 / math.sqrt(head_dim)),
            softcap=node.attributes.get_float("softcap", 0.0),
            causal=causal,
            window=_window(node, "left") + 1,
            ahead=_window(node, "right") if _window(node, "right") >= 0 else None,
            band=_band(node, causal=causal),
            masks=_masks(node),
            key_counts=input_of(node, _COUNTS),
            behind_past=past is not None,
        )
    except NotTappable as why:
        reason = Untappable(str(why))
        return FoundSite(node, operator, heads, kv_heads, head_dim, reason, form=_form(node), causal=causal)
    return FoundSite(node, operator, heads, kv_heads, head_dim, scores, form=_form(node), causal=causal)


def _form(node: ir.Node) -> Literal["dense", "windowed"]:
    return "windowed" if _windowed(node) else "dense"


def _windowed(node: ir.Node) -> bool:
    return any(_window(node, side) >= 0 for side in ("left", "right"))


def _window(node: ir.Node, side: str) -> int:
    """Return how many keys a query attends to on one side; -1 for all."""
    return node.attributes.get_int(f"{side}_window_size", -1)


def _band(node: ir.Node, *, causal: bool) -> SlidingBand | None:
    """Return the band, where it ends on both sides, and queries and keys of every row count from the first."""
    if input_of(node, _COUNTS) is not None or past_of(node, _PAST_KEY) is not None:
        return None
    before, after = _window(node, "left"), 0 if causal else _window(node, "right")
    return SlidingBand(before=before, after=after) if before >= 0 and after >= 0 else None


def _refuse_unsupported(node: ir.Node, graph: ir.Graph, query: Operand, key: Operand) -> None:
    refuse_subgraph(node, graph)
    refuse_uneven_heads(query.heads, key.heads)
    if query.packed != key.packed:
        raise NotTappable("the ranks of query and key differ")
    for operand in (query, key):
        if operand.value.dtype not in _FLOATS:
            raise NotTappable(f"the type of {operand.value.name!r} is no known floating-point type")


def _operand(node: ir.Node, position: int, attribute: str) -> Operand:
    """Return query or key. Packed (rank 3), the attribute states its heads; of rank 4, the shape does."""
    value = required(node, position, "query" if position == 0 else "key")
    declared = node.attributes.get_int(attribute, 0)
    rank = len(value.shape) if value.shape is not None else (3 if declared else 4)
    if rank == 3 and declared >= 1:
        return Operand(value, declared, packed=True)
    if rank != 4:
        raise NotTappable(f"{value.name!r} has rank {rank}" + (f" without {attribute}" if rank == 3 else ""))
    heads = value.shape[1] if value.shape is not None else declared
    if not isinstance(heads, int) or heads < 1:
        raise NotTappable(f"the number of heads of {value.name!r} is not in the graph")
    return Operand(value, heads, packed=False)


def _head_dim(query: Operand) -> int:
    last = query.value.shape[-1] if query.value.shape is not None else None
    if not isinstance(last, int) or last < 1 or (query.packed and last % query.heads):
        raise NotTappable(f"the head size of {query.value.name!r} is not in the graph")
    return last // query.heads if query.packed else last


def _masks(node: ir.Node) -> tuple[Mask, ...]:
    value = input_of(node, 3)
    if value is None:
        return ()
    if value.shape is None:
        raise NotTappable(f"the rank of its mask {value.name!r} is not known")
    rank = len(value.shape)
    if rank not in _MASK_RANKS:
        raise NotTappable(f"its mask {value.name!r} has rank {rank}; 2, 3 and 4 are supported")
    if value.dtype is not ir.DataType.BOOL and value.dtype not in _FLOATS:
        raise NotTappable(f"the type of its mask {value.name!r} is not known")
    return (Mask(value, rank, boolean=value.dtype is ir.DataType.BOOL),)
