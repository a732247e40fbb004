"""Finds attention that a graph computes step by step: a softmax over keys whose result multiplies the value.

What makes a softmax attention: its scores come, through steps that change numbers one by one or move axes about, from
a product of two activations (or of an activation with constant queries), or from sums of such for every query and key;
and the product with the value, an activation too, sums over the axis of softmax. Classifiers, gates of mixtures and
pooling by a constant vector lack one of these. Several softmaxes whose results one product takes (their difference,
say, or each with keys of its own) are one site: its weights are what multiplies the value.
Source: Vaswani et al. 2017, eq. 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from attnserve_server.conversion.base.sites import FoundSite, Probabilities, Untappable
from attnserve_server.conversion.finders.decomposed_products import Product, mixes_heads
from attnserve_server.conversion.finders.decomposed_softmax import Softmax, softmaxes
from attnserve_server.conversion.finders.decomposed_walk import (
    Axis,
    backward,
    dynamic_values,
    extent_of,
    forward,
    rank_of,
)
from attnserve_server.conversion.finders.decomposed_written_out import (
    product_written_out,
    refused_sum,
    sums_of_queries_and_keys,
)

_KEEPS_SUMS = {
    *("Cast", "CastLike", "Identity", "Dropout", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand"),
}
"""Steps behind softmax after which rows still sum to 1; behind any other they need not."""
_PARTS = {"Slice", "Split", "Gather"}


@dataclass(frozen=True, slots=True)
class _Contraction:
    """A product of weights and value. `axis` is None where the keys got lost on the way."""

    product: Product
    position: int
    axis: Axis
    whole: bool
    part: ir.Value | None

    @property
    def weights(self) -> ir.Value:
        return self.product.floating(self.position)

    @property
    def value(self) -> ir.Value:
        return self.product.floating(1 - self.position)


def find(graph: ir.Graph) -> Iterator[FoundSite]:
    """All of a graph, those in subgraphs too."""
    dynamic = dynamic_values(graph)
    found: dict[tuple[ir.Node, int], FoundSite] = {}
    for softmax in softmaxes(graph):
        scores = _score_products(softmax, dynamic)
        scores = scores or sums_of_queries_and_keys(softmax.scores, softmax.axis, dynamic)
        contractions = _contractions(softmax, dynamic) if scores else []
        if contractions:
            site = _site(softmax, scores, contractions, graph)
            at = contractions[0].product.node, contractions[0].position
            found[at] = _joined(found[at], site) if at in found else site
        elif scores and (reason := refused_sum(softmax.node.outputs[0], softmax.axis, dynamic)):
            operator = f"{scores[0].op_type}-{softmax.spelling}-Mul-ReduceSum"
            found[softmax.node, 0] = FoundSite(softmax.node, operator, 0, 0, 0, Untappable(reason))
    yield from found.values()


def _joined(site: FoundSite, other: FoundSite) -> FoundSite:
    """A site whose weights are made of those of two softmaxes."""
    one, two = site.attention, other.attention
    if not isinstance(one, Probabilities) or not isinstance(two, Probabilities):
        return other if isinstance(one, Probabilities) else site
    return replace(site, attention=replace(one, scores=(*one.scores, *two.scores), whole=False))


def _score_products(softmax: Softmax, dynamic: set[ir.Value]) -> list[ir.Node]:
    """The products that scores come from and that make them attention's."""
    products: list[ir.Node] = []
    open_: list[tuple[ir.Value, Axis]] = [(softmax.scores, softmax.axis)]
    seen: set[ir.Value] = set()
    while open_:
        value, axis = open_.pop()
        node = value.producer()
        if node is None or value in seen or value not in dynamic:
            continue
        seen.add(value)
        product = Product.of(node)
        if product is not None and _of_attention(product, axis, dynamic):
            products.append(node)
        elif _mixed(node, 0, axis, dynamic):
            assert node.inputs[0] is not None
            open_.append((node.inputs[0], axis))
        elif node.op_type == "ReduceSum":
            if product_written_out(node, dynamic):
                products.append(node)
        elif not (node.op_type == "Sub" and _is_mean(node.inputs[1])):
            open_.extend(backward(node, axis))
    return products


def _mixed(node: ir.Node, position: int, axis: Axis, dynamic: set[ir.Value]) -> bool:
    """Whether a node mixes heads by a constant table, and leaves the keys where they are."""
    keys = {"MatMul": (-2, -3), "Conv": (-1, -2)}.get(node.op_type, ())
    return axis in keys and mixes_heads(node, position) and node.inputs[1] not in dynamic


def _of_attention(product: Product, axis: Axis, dynamic: set[ir.Value]) -> bool:
    """Whether queries meet keys in a product: two activations, or constant queries and keys along softmax's axis."""
    active = [product.operand(position) in dynamic for position in (0, 1)]
    if all(active):
        return True
    if not any(active) or axis is None:
        return False
    position = active.index(False)
    constant = product.operand(position)
    if position == 1 and rank_of(constant) in {1, 2}:
        return False  # a linear layer, whose columns are no queries
    from_constant, from_keys = product.sources(axis)[position], product.sources(axis)[1 - position]
    return from_keys and not from_constant and product.rows_of_constant(position) >= 2


def _is_mean(value: ir.Value | None) -> bool:
    """Behind a normalisation written out stands a residual stream, which has products of its own."""
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == "ReduceMean"


def _contractions(softmax: Softmax, dynamic: set[ir.Value]) -> list[_Contraction]:
    """Products with an activation that sum over softmax's axis, nearest first."""
    found: list[_Contraction] = []
    open_: list[tuple[ir.Value, Axis, bool, ir.Value | None]] = [(softmax.node.outputs[0], softmax.axis, True, None)]
    seen: set[ir.Value] = set()
    while open_:
        value, axis, whole, part = open_.pop(0)
        if value in seen:
            continue
        seen.add(value)
        for node, position in value.uses():
            product = Product.of(node)
            if _mixed(node, position, axis, dynamic):
                open_.append((node.outputs[0], axis, False, part))
            elif product is not None:
                if position in product.inputs and _multiplies(product, product.inputs.index(position), axis, dynamic):
                    found.append(_Contraction(product, product.inputs.index(position), axis, whole, part))
                continue
            moved = forward(node, position, axis)
            if moved is not False:
                kept = whole and node.op_type in _KEEPS_SUMS
                outputs = node.outputs if node.op_type == "Split" else node.outputs[:1]
                open_ += [(out, moved, kept, out if node.op_type in _PARTS else part) for out in outputs]
    return found


def _multiplies(product: Product, position: int, axis: Axis, dynamic: set[ir.Value]) -> bool:
    """Whether a product sums weights, over their keys, along with an activation."""
    other = product.operand(1 - position)
    same = other is product.operand(position)
    return other in dynamic and not same and (axis is None or product.sums_over(position, axis))


def _site(softmax: Softmax, scores: list[ir.Node], contractions: list[_Contraction], graph: ir.Graph) -> FoundSite:
    first = contractions[0]
    operator = f"{scores[0].op_type}-{softmax.spelling}-{first.product.node.op_type}"
    score = Product.of(scores[0])
    head_dim = score.summed_extent() if score else 0
    heads, kv_heads = _heads(first)
    reason = softmax.refused or _reason(softmax, contractions, graph)
    if reason:
        return FoundSite(softmax.node, operator, heads, kv_heads, head_dim, Untappable(reason))
    assert first.axis is not None
    probabilities = Probabilities(
        first.weights,
        first.axis,
        product=first.product.node,
        position=first.position,
        value=first.value,
        output=first.product.floating_output(),
        query_axes=first.product.kept(first.position),
        scores=tuple(scores),
        whole=first.whole,
    )
    return FoundSite(softmax.node, operator, heads, kv_heads, head_dim, probabilities)


def _reason(softmax: Softmax, contractions: list[_Contraction], graph: ir.Graph) -> str:
    """Why such a site cannot be tapped; empty where nothing is known against it."""
    first = contractions[0]
    if softmax.node.graph is not graph or first.product.node.graph is not graph:
        return "it stands inside a subgraph, whose values the outer graph cannot see"
    if first.axis is None:
        return "its keys cannot be followed from softmax to the product with the value"
    if first.part is not None and any(other.part is not first.part for other in contractions):
        return "parts of its keys are multiplied with values apart"
    if not first.product.kept(first.position):
        return "its weights have no axis of queries"
    return ""


def _heads(contraction: _Contraction) -> tuple[int, int]:
    """Heads of query and of key, as far as shapes tell; 0 where they do not, which running the graph sets right."""
    weights, axis, product = contraction.weights, contraction.axis, contraction.product
    rank, own = rank_of(weights), product.kept(contraction.position)
    if axis is None or rank is None or rank < 4 or not own:
        return 0, 0
    query = min(own, key=lambda place: abs(place - axis))
    heads = kv_heads = 1
    not_told = 0
    for place in range(-rank, 0):
        extent, other = extent_of(weights, place), product.counterpart(contraction.position, place)
        if place in {query, axis}:
            continue
        not_told += extent is None
        heads *= extent or 1
        kv_heads *= (extent_of(contraction.value, other) or 1) if other is not None and extent is not None else 1
    if not_told > 1:  # the batch alone
        return 0, 0
    kv_heads = _repeated_heads(contraction.value) or kv_heads
    return heads, kv_heads if heads % kv_heads == 0 else heads


def _repeated_heads(value: ir.Value) -> int:
    """Heads of a value that repeats each of them, (B, K, 1, S, D) -> (B, K, G, S, D) -> (B, H, S, D); 0 for others."""
    merged = value.producer()
    while merged is not None and merged.op_type in {"Cast", "Transpose", "Identity"} and merged.inputs[0] is not None:
        merged = merged.inputs[0].producer()
    if merged is None or merged.op_type != "Reshape" or merged.inputs[0] is None:
        return 0
    repeated = merged.inputs[0].producer()
    if repeated is None or repeated.op_type != "Expand" or rank_of(repeated.inputs[0]) != 5:
        return 0
    return (extent_of(repeated.inputs[0], -4) or 0) if extent_of(repeated.inputs[0], -3) == 1 else 0
