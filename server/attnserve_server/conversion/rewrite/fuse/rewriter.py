"""Puts fused operators into a graph, in the place of decomposed sites, and packed heads in the place of split ones."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from attnserve_server.conversion.rewrite.fuse.carried import (
    HEADS_FIRST,
    Carried,
    axis_of,
    constant,
    permutation,
    rank,
)
from attnserve_server.conversion.rewrite.fuse.masks import bias_of
from attnserve_server.conversion.rewrite.fuse.nodes import Attribute, NewNodes, stand_in, typed
from attnserve_server.conversion.rewrite.fuse.packing import PackableSite
from attnserve_server.conversion.rewrite.fuse.plain import PlainSite

PENDING = "attnserve.pending"
"""The domain of Attention until its graph has the opset that it needs."""
_CONTRIB = "com.microsoft"


class Rewriter:
    """Rewrites the sites of one graph, one after the other in the graph's order."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._new = NewNodes(graph)

    def attention(self, site: PlainSite) -> None:
        """`Attention` on packed values where the graph has them, else on (B, H, T, D)."""
        self._graph.opset_imports[PENDING] = 1
        packed = is_packed(site)
        query, key, value = (self._operand(one, packed=packed) for one in (site.query, site.key, site.value))
        bias = bias_of(site.masks, query, key, self._new, axis=1 if packed else 2, spare_lowest=True)
        attributes: dict[str, Attribute] = {"scale": site.scale}
        if packed:
            attributes |= {"q_num_heads": site.query.heads, "kv_num_heads": site.key.heads}
        inputs = [query, key, value, *([bias] if bias is not None else [])]
        output = self._new.op("Attention", inputs, PENDING, **attributes)
        _name_after(output, site.softmax)
        self._stand_in(output, site.output, site.query, site.value, packed=packed)

    def multi_head(self, site: PlainSite) -> None:
        """`MultiHeadAttention` on packed values."""
        self._graph.opset_imports.setdefault(_CONTRIB, 1)
        query, key, value = (self._operand(one, packed=True) for one in (site.query, site.key, site.value))
        bias = bias_of(site.masks, query, key, self._new, axis=1, spare_lowest=False)
        inputs = [query, key, value, *([None, None, bias] if bias is not None else [])]
        attributes: dict[str, Attribute] = {"num_heads": site.query.heads, "scale": site.scale}
        output = self._new.op("MultiHeadAttention", inputs, _CONTRIB, **attributes)
        _name_after(output, site.softmax)
        self._stand_in(output, site.output, site.query, site.value, packed=True)

    def packed(self, site: PackableSite) -> None:
        """The same `Attention`, on packed values."""
        self._graph.opset_imports[PENDING] = 1
        operands = [self._operand(one, packed=True) for one in (site.query, site.key, site.value)]
        output = self._new.op("Attention", [*operands, *site.node.inputs[3:4]], PENDING)
        node = _name_after(output, site.node)
        for name, attribute in site.node.attributes.items():
            node.attributes[name] = attribute
        node.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", site.query.heads)
        node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", site.key.heads)
        self._stand_in(output, site.node.outputs[0], site.query, site.value, packed=True)

    def _operand(self, carried: Carried, *, packed: bool) -> ir.Value:
        if packed and carried.packed is not None:
            return carried.packed
        if not carried.heads_last:
            return carried.value
        batch, length, *rest = carried.value.shape or [None] * 4
        heads_first = self._new.op("Transpose", [carried.value], perm=HEADS_FIRST)
        return typed(heads_first, carried.value.dtype, [batch, rest[0], length, rest[1]])

    def _stand_in(self, output: ir.Value, old: ir.Value, query: Carried, value: Carried, *, packed: bool) -> None:
        """Let the new operator's output stand for the old (B, H, L, D); whoever turns that back gets it unturned."""
        made_by = old.producer()
        assert made_by is not None
        dtype = old.dtype or query.value.dtype
        places: list[tuple[ir.Value, ir.Value]] = []
        if packed:
            assert query.packed is not None
            batch, length, _ = query.packed.shape or [None] * 3
            typed(output, dtype, [batch, length, query.heads * value.head_dim])
            parts = self._new.op("Reshape", [output, self._new.ints(0, 0, query.heads, value.head_dim)])
            typed(parts, dtype, [batch, length, query.heads, value.head_dim])
            places = [(each, parts) for each in _turned_back(old, query, value)]
            output = self._new.op("Transpose", [parts], perm=HEADS_FIRST)
            typed(output, dtype, [batch, query.heads, length, value.head_dim])
        else:
            typed(output, dtype, list(old.shape or [None] * 4))
        self._new.put_behind(made_by)
        for one, other in [*places, (old, output)]:
            stand_in(one, other)


def is_packed(site: PlainSite) -> bool:
    """Whether query, key and value all were split from packed values."""
    return all(one.packed is not None for one in (site.query, site.key, site.value))


def _name_after(output: ir.Value, node: ir.Node) -> ir.Node:
    """Sites are named by what exporters left at the node that the new one takes the place of."""
    made_by = output.producer()
    assert made_by is not None
    made_by.name = node.name
    made_by.metadata_props.update(node.metadata_props)
    return made_by


def _turned_back(output: ir.Value, query: Carried, value: Carried) -> list[ir.Value]:
    """The (B, L, H, D) that the graph makes of weights @ value; reshaping to the shape it has anyway is looked past."""
    found: list[ir.Value] = []
    for node in output.consumers():
        if node.op_type == "Transpose" and permutation(node) == HEADS_FIRST:
            found.append(node.outputs[0])
        elif node.op_type == "Reshape" and _keeps_shape(node, query, value):
            users = node.outputs[0].consumers()
            turned = [user.outputs[0] for user in users if user.op_type == "Transpose"]
            found += [each for each in turned if each.producer() is not None and _turns(each)]
    return found


def _turns(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and permutation(node) == HEADS_FIRST


def _keeps_shape(reshape: ir.Node, query: Carried, value: Carried) -> bool:
    """Whether every extent that a Reshape of (B, H, L, D) asks for is the one that is there; one may be left open."""
    shape = reshape.inputs[1].producer() if reshape.inputs[1] is not None else None
    if rank(reshape.outputs[0]) != 4 or shape is None or shape.op_type != "Concat" or len(shape.inputs) != 4:
        return False
    output, fixed = reshape.inputs[0], (None, query.heads, None, value.head_dim)
    same: Sequence[Sequence[ir.Value | None]] = (
        (output, query.value, value.value),
        (output, query.value),
        (output, query.value),
        (output, value.value),
    )
    asked = [constant(one) for one in shape.inputs]
    sources = [axis_of(one) for one in shape.inputs]
    for axis, (number, source) in enumerate(zip(asked, sources, strict=True)):
        as_told = number is not None and number in {-1, 0, fixed[axis]}
        as_read = source is not None and source[1] == axis and any(source[0] is one for one in same[axis])
        if not (as_told or as_read):
            return False
    return asked.count(-1) <= 1
