"""Replace decomposed sites by fused operators in a graph, and split heads by packed ones.

All masks of a site become one bias, which fused operators add to the scores. Every site must be one that `plain_sites`
or `packable_sites` found in the same graph, and for `multi_head` a packed one. Nothing is refused here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.graphs.nodes import Attribute, Dimension, NodeBuilder, typed
from attnserve_server.conversion.graphs.walk import constant_number, permutation_of, producer_of, rank_of
from attnserve_server.conversion.rewrite.fuse.heads import (
    HEADS_FIRST,
    PackableSite,
    SplitHeads,
    source_of_dimension,
)
from attnserve_server.conversion.rewrite.fuse.plain import MaskStep, PlainSite

PENDING = "attnserve.pending"
"""The domain of Attention until its graph has the opset that it needs."""
_CONTRIB = "com.microsoft"


class Rewriter:
    """Rewrites the sites of one graph, one after the other in the graph's order."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._new = NodeBuilder(graph, "attnserve.fused/")

    def attention(self, site: PlainSite) -> None:
        """Replace a site by `Attention`, on packed values where the graph has them, else on (B, H, T, D)."""
        self._graph.opset_imports[PENDING] = 1
        packed = is_packed(site)
        query, key, value = (self._operand(one, packed=packed) for one in (site.query, site.key, site.value))
        bias = bias_of(site.masks, query, key, self._new, axis=1 if packed else 2, spare_lowest=True)
        attributes: dict[str, Attribute] = {"scale": site.scale}
        if packed:
            attributes |= {"q_num_heads": site.query.heads, "kv_num_heads": site.key.heads}
        inputs = [query, key, value, *([bias] if bias is not None else [])]
        [output] = self._new.outputs_of("Attention", inputs, 1, attributes, domain=PENDING)
        _name_after(output, site.softmax)
        self._replace(site.output, output, site.query, site.value, packed=packed)

    def multi_head(self, site: PlainSite) -> None:
        """Replace a site by `MultiHeadAttention` on packed values."""
        self._graph.opset_imports.setdefault(_CONTRIB, 1)
        query, key, value = (self._operand(one, packed=True) for one in (site.query, site.key, site.value))
        bias = bias_of(site.masks, query, key, self._new, axis=1, spare_lowest=False)
        inputs = [query, key, value, *([None, None, bias] if bias is not None else [])]
        attributes: dict[str, Attribute] = {"num_heads": site.query.heads, "scale": site.scale}
        [output] = self._new.outputs_of("MultiHeadAttention", inputs, 1, attributes, domain=_CONTRIB)
        _name_after(output, site.softmax)
        self._replace(site.output, output, site.query, site.value, packed=True)

    def packed(self, site: PackableSite) -> None:
        """Replace an `Attention` node by the same on packed values."""
        self._graph.opset_imports[PENDING] = 1
        operands = [self._operand(one, packed=True) for one in (site.query, site.key, site.value)]
        heads: dict[str, Attribute] = {"q_num_heads": site.query.heads, "kv_num_heads": site.key.heads}
        attributes: dict[str, Attribute] = {**site.node.attributes, **heads}
        inputs = [*operands, *site.node.inputs[3:4]]
        [output] = self._new.outputs_of("Attention", inputs, 1, attributes, domain=PENDING)
        _name_after(output, site.node)
        self._replace(site.node.outputs[0], output, site.query, site.value, packed=True)

    def _operand(self, operand: SplitHeads, *, packed: bool) -> ir.Value:
        if packed and operand.packed is not None:
            return operand.packed
        if not operand.heads_last:
            return operand.value
        batch, length, *rest = operand.value.shape or [None] * 4
        heads_first = self._new.op("Transpose", [operand.value], perm=HEADS_FIRST)
        return typed(heads_first, operand.value.dtype, [batch, rest[0], length, rest[1]])

    def _replace(self, old: ir.Value, new: ir.Value, query: SplitHeads, value: SplitHeads, *, packed: bool) -> None:
        """Put a new operator's output in the place of the old (B, H, L, D), and of the (B, L, H, D) made from that."""
        made_by = old.producer()
        assert made_by is not None
        dtype = old.dtype or query.value.dtype
        heads_last: list[tuple[ir.Value, ir.Value]] = []
        if packed:
            assert query.packed is not None
            batch, length, _ = query.packed.shape or [None] * 3
            typed(new, dtype, [batch, length, query.heads * value.head_dim])
            parts = self._new.op("Reshape", [new, self._new.ints(0, 0, query.heads, value.head_dim)])
            typed(parts, dtype, [batch, length, query.heads, value.head_dim])
            heads_last = [(each, parts) for each in _transposed_back(old, query, value)]
            new = self._new.op("Transpose", [parts], perm=HEADS_FIRST)
            typed(new, dtype, [batch, query.heads, length, value.head_dim])
        else:
            typed(new, dtype, list(old.shape or [None] * 4))
        self._new.place_after(made_by)
        for one, other in [*heads_last, (old, new)]:
            _replace_uses(one, other)


def _replace_uses(old: ir.Value, new: ir.Value) -> None:
    """Put one value in the place of another, as an output of the graph too."""
    if old.is_graph_output():
        assert old.name is not None
        old.name, new.name = f"{old.name}.unfused", old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def is_packed(site: PlainSite) -> bool:
    """Return whether query, key and value all were split from packed values."""
    return all(one.packed is not None for one in (site.query, site.key, site.value))


def _name_after(output: ir.Value, node: ir.Node) -> None:
    """Give a new node the name and the metadata of the one it replaces, by which its site is named."""
    made_by = output.producer()
    assert made_by is not None
    made_by.name = node.name
    made_by.metadata_props.update(node.metadata_props)


def _transposed_back(output: ir.Value, query: SplitHeads, value: SplitHeads) -> list[ir.Value]:
    """Return the (B, L, H, D) that the graph makes of weights @ value, also behind a Reshape that changes nothing."""
    found: list[ir.Value] = []
    for node in output.consumers():
        if node.op_type == "Transpose" and permutation_of(node) == HEADS_FIRST:
            found.append(node.outputs[0])
        elif node.op_type == "Reshape" and _keeps_shape(node, query, value):
            transposes = [user for user in node.outputs[0].consumers() if user.op_type == "Transpose"]
            found += [user.outputs[0] for user in transposes if permutation_of(user) == HEADS_FIRST]
    return found


def _keeps_shape(reshape: ir.Node, query: SplitHeads, value: SplitHeads) -> bool:
    """Return whether every size that a Reshape of (B, H, L, D) takes is the one it has; one may be -1."""
    shape = producer_of(reshape.inputs[1], "Concat")
    if rank_of(reshape.outputs[0]) != 4 or shape is None or len(shape.inputs) != 4:
        return False
    output, fixed = reshape.inputs[0], (None, query.heads, None, value.head_dim)
    same: Sequence[Sequence[ir.Value | None]] = (
        (output, query.value, value.value),
        (output, query.value),
        (output, query.value),
        (output, value.value),
    )
    numbers = [constant_number(one) for one in shape.inputs]
    sources = [source_of_dimension(one) for one in shape.inputs]
    for axis, (number, source) in enumerate(zip(numbers, sources, strict=True)):
        as_stated = number is not None and number in {-1, 0, fixed[axis]}
        as_read = source is not None and source[1] == axis and any(source[0] is one for one in same[axis])
        if not (as_stated or as_read):
            return False
    return numbers.count(-1) <= 1


def bias_of(
    masks: Sequence[MaskStep], query: ir.Value, key: ir.Value, new: NodeBuilder, *, axis: int, spare_lowest: bool
) -> ir.Value | None:
    """Return the sum of all masks, (B or 1, H or 1, L, S), which gives fully masked rows the weights they have now.

    Args:
        masks: in the order in which they apply.
        query: has L as the size of `axis`.
        key: has S.
        new: receives the nodes.
        axis: of positions, in both.
        spare_lowest: raise the lowest number of the type to the next one. A kernel that treats the lowest as minus
            infinity would set rows of it to zero, where softmax makes them uniform: findings/attention_lowest_mask.sh.
    """
    if not masks:
        return None
    dtype = query.dtype or ir.DataType.FLOAT
    lowest = float(np.finfo(dtype.numpy()).min)
    spared = float(np.nextafter(dtype.numpy().type(lowest), dtype.numpy().type(0))) if spare_lowest else lowest
    # Any number this low hides a key. It also exceeds every score so far that rows of hidden keys stay uniform.
    swallows = max(lowest / 2, -1e30)
    bias: ir.Value | None = None
    for step in masks:
        value = _of_rank_4(step.value, new)
        if step.fill is None:
            value = value if value.dtype is dtype else new.op("Cast", [value], shared=True, to=int(dtype))
            bias = value if bias is None else new.op("Add", [bias, value], shared=True)
            continue
        number = step.fill if np.isinf(step.fill) else max(min(step.fill, swallows), spared)
        fill, shown = new.number(number, dtype), bias if bias is not None else new.number(0.0, dtype)
        bias = new.op("Where", [value, *((fill, shown) if step.inverted else (shown, fill))], shared=True)
    assert bias is not None
    if spare_lowest and _may_hold(masks, lowest):
        reaches = new.op("Equal", [bias, new.number(lowest, dtype)], shared=True)
        bias = new.op("Where", [reaches, new.number(spared, dtype), bias], shared=True)
    front: Sequence[Dimension] = (None, None)
    shape = masks[0].value.shape
    if len(masks) == 1 and shape is not None:
        front = [1] * (4 - len(shape)) + list(shape)
    lengths = (_dimension(query, axis), _dimension(key, axis))
    if len(masks) > 1 or not _spans(front[-2:], lengths):
        # Kernels broadcast over batch and heads alone.
        sizes = [new.ints(1, 1), *(new.shape(one, axis, axis + 1, shared=True) for one in (query, key))]
        bias = new.op("Expand", [bias, new.op("Concat", sizes, shared=True, axis=0)], shared=True)
    return typed(bias, dtype, [*front[:2], *lengths])


def _of_rank_4(value: ir.Value, new: NodeBuilder) -> ir.Value:
    """Return a mask with axes of size 1 in front; one of unknown rank has four."""
    added = 4 - len(value.shape) if value.shape is not None else 0
    return new.unsqueeze(value, *range(added), shared=True) if added > 0 else value


def _may_hold(masks: Sequence[MaskStep], number: float) -> bool:
    """Return whether a bias may hold a number: a Where of two constants holds these, and sums may hold any number."""
    added = [step.value for step in masks if step.fill is None]
    if not added or len(masks) > 1:
        return bool(added)
    node = producer_of(added[0], "Where")
    chosen = [constant_number(one) for one in node.inputs[1:]] if node is not None else [None]
    return None in chosen or number in chosen


def _dimension(value: ir.Value, axis: int) -> Dimension:
    return value.shape[axis] if value.shape is not None else None


def _spans(sizes: Sequence[Dimension], lengths: Sequence[Dimension]) -> bool:
    """Return whether a mask is known to have a row for every query and a column for every key."""
    pairs = zip(sizes, lengths, strict=True)
    return all(one == other and not (isinstance(one, ir.SymbolicDim) and one.value is None) for one, other in pairs)
