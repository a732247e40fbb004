r"""Find attention in single operators: a softmax over keys, whose result is multiplied with the values.

    queries  keys^T
         \  /
        MatMul            scores: both operands are activations (constant queries are allowed)
           |
    scale, masks, layout  elementwise, or moving axes: graphs/axes.py follows the keys' axis
           |
        Softmax           over the keys
           |
    casts, guards, layout
           |   values
            \  /
           MatMul         sums over the keys; the values are activations

Classifiers, gates of mixtures of experts and pooling by one constant vector lack one of the two MatMuls. Several
softmaxes whose results meet in one MatMul (their difference, for example) are one site, because a tap shows what
multiplies the values. Einsum, Gemm and the integer forms count as MatMul (graphs/contraction.py). A site, a place in a
graph that computes attention, whose weights cannot be read is yielded as `Untappable(reason)`. `find` raises nothing.
Source: Vaswani et al. 2017, eq. 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from attnserve_server.conversion.base.quantizers import Levels, Quantizer
from attnserve_server.conversion.base.sites import FoundSite, Probabilities, Untappable
from attnserve_server.conversion.finders.decomposed_softmax import Softmax, softmaxes
from attnserve_server.conversion.finders.decomposed_sums import (
    refused_sum,
    sums_of_queries_and_keys,
    sums_of_two_activations,
)
from attnserve_server.conversion.graphs.axes import Axis, backward, forward
from attnserve_server.conversion.graphs.contraction import Contraction
from attnserve_server.conversion.graphs.walk import (
    activations_of,
    before,
    constant_number,
    dimension_of,
    input_of,
    producer_of,
    rank_of,
)

_KEEPS_SUMS = {
    *("Cast", "CastLike", "Identity", "Dropout", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand"),
}
"""Operators behind softmax after which rows still sum to 1; behind any other they need not."""
_CUTTING = {"Slice", "Split", "Gather"}
"""Operators that cut the weights into parts."""
_INTEGERS = {
    ir.DataType.INT8: (-(2**7), 2**7 - 1),
    ir.DataType.UINT8: (0, 2**8 - 1),
    ir.DataType.INT16: (-(2**15), 2**15 - 1),
    ir.DataType.UINT16: (0, 2**16 - 1),
}
"""The least and the greatest number of each type that quantizers round to."""
_MOST_HEADS = 128
"""The most heads that a table mixes; larger square tables are linear layers."""


@dataclass(frozen=True, slots=True)
class _WeightedSum:
    """The MatMul of weights and values.

    Attributes:
        contraction: the node.
        position: which operand the weights are.
        axis: of the keys in the weights; None where it was lost on the way from softmax.
        whole: whether rows of weights still sum to 1.
        part: the output of the last node that cut the weights, if any.
    """

    contraction: Contraction
    position: int
    axis: Axis
    whole: bool
    part: ir.Value | None

    @property
    def query_axes(self) -> tuple[int, ...]:
        return self.contraction.own_axes(self.position)


def find(graph: ir.Graph) -> Iterator[FoundSite]:
    """Yield the sites of this form, those in subgraphs too."""
    activations = activations_of(graph)
    found: dict[tuple[ir.Node, int], FoundSite] = {}
    for softmax in softmaxes(graph):
        scores = _score_nodes(softmax, activations)
        scores = scores or sums_of_queries_and_keys(softmax.scores, softmax.axis, activations)
        sums = _weighted_sums(softmax, activations) if scores else []
        if sums:
            site = _site(softmax, scores, sums, graph)
            at = sums[0].contraction.node, sums[0].position
            found[at] = _joined(found[at], site) if at in found else site
        elif scores and (reason := refused_sum(softmax.node.outputs[0], softmax.axis, activations)):
            operator = f"{scores[0].op_type}-{softmax.spelling}-Mul-ReduceSum"
            found[softmax.node, 0] = FoundSite(softmax.node, operator, 0, 0, 0, Untappable(reason))
    yield from found.values()


def _joined(site: FoundSite, other: FoundSite) -> FoundSite:
    """Return one site of two softmaxes whose results meet in one MatMul."""
    one, two = site.attention, other.attention
    if not isinstance(one, Probabilities) or not isinstance(two, Probabilities):
        return other if isinstance(one, Probabilities) else site
    return replace(site, attention=replace(one, scores=(*one.scores, *two.scores), whole=False))


def _score_nodes(softmax: Softmax, activations: set[ir.Value]) -> list[ir.Node]:
    """Return the MatMuls of queries and keys that the scores of a softmax are computed from."""
    found: list[ir.Node] = []
    waiting: list[tuple[ir.Value, Axis]] = [(softmax.scores, softmax.axis)]
    seen: set[ir.Value] = set()
    while waiting:
        value, axis = waiting.pop()
        node = value.producer()
        if node is None or value in seen or value not in activations:
            continue
        seen.add(value)
        contraction = Contraction.of(node)
        if contraction is not None and _multiplies_keys(contraction, axis, activations):
            found.append(node)
        elif _mixes_heads(node, 0, axis, activations):
            assert node.inputs[0] is not None
            waiting.append((node.inputs[0], axis))
        elif node.op_type == "ReduceSum":
            if sums_of_two_activations(node, activations):
                found.append(node)
        elif not (node.op_type == "Sub" and producer_of(node.inputs[1], "ReduceMean")):
            # x - mean(x) is a normalization: behind it is a residual stream, whose MatMuls are other ones.
            waiting.extend(backward(node, axis))
    return found


def _mixes_heads(node: ir.Node, position: int, axis: Axis, activations: set[ir.Value]) -> bool:
    """Return whether a node mixes heads by a constant table, and leaves the keys in their place.

    The table is that of (B, L, S, H) @ (H, H), or of a convolution of size 1. Source: Shazeer et al. 2020,
    "Talking-Heads Attention".
    """
    key_axes = {"MatMul": (-2, -3), "Conv": (-1, -2)}.get(node.op_type, ())
    table = input_of(node, 1)
    if position != 0 or axis not in key_axes or table is None or table in activations:
        return False
    rank = {"MatMul": 2, "Conv": 4}[node.op_type]
    if rank_of(node.inputs[0]) != 4 or rank_of(table) != rank:
        return False
    heads = [dimension_of(table, place) for place in (-rank, 1 - rank)]
    kernel = [dimension_of(table, place) for place in range(2 - rank, 0)]
    return heads[0] == heads[1] and 1 < (heads[0] or 0) <= _MOST_HEADS and all(size == 1 for size in kernel)


def _multiplies_keys(contraction: Contraction, axis: Axis, activations: set[ir.Value]) -> bool:
    """Return whether queries and keys meet: two activations, or constant queries and keys along softmax's axis."""
    active = [contraction.operand(position) in activations for position in (0, 1)]
    if all(active):
        return True
    if not any(active) or axis is None:
        return False
    position = active.index(False)
    if position == 1 and rank_of(contraction.operand(position)) in {1, 2}:
        return False  # a linear layer, whose columns are no queries
    sources = contraction.sources(axis)
    return sources[1 - position] and not sources[position] and contraction.vectors_in(position) >= 2


def _weighted_sums(softmax: Softmax, activations: set[ir.Value]) -> list[_WeightedSum]:
    """Return the MatMuls of an activation with the weights that sum over softmax's axis, nearest first."""
    found: list[_WeightedSum] = []
    waiting: list[tuple[ir.Value, Axis, bool, ir.Value | None]] = [(softmax.node.outputs[0], softmax.axis, True, None)]
    seen: set[ir.Value] = set()
    while waiting:
        value, axis, whole, part = waiting.pop(0)
        if value in seen:
            continue
        seen.add(value)
        for node, position in value.uses():
            contraction = Contraction.of(node)
            if _mixes_heads(node, position, axis, activations):
                waiting.append((node.outputs[0], axis, False, part))
            elif contraction is not None:
                if position in contraction.inputs:
                    operand = contraction.inputs.index(position)
                    if _sums_over_keys(contraction, operand, axis, activations):
                        found.append(_WeightedSum(contraction, operand, axis, whole, part))
                continue
            moved = forward(node, position, axis)
            if moved is not False:
                kept = whole and node.op_type in _KEEPS_SUMS
                outputs = node.outputs if node.op_type == "Split" else node.outputs[:1]
                waiting += [(each, moved, kept, each if node.op_type in _CUTTING else part) for each in outputs]
    return found


def _sums_over_keys(contraction: Contraction, position: int, axis: Axis, activations: set[ir.Value]) -> bool:
    """Return whether a MatMul sums weights over their keys together with another activation."""
    other = contraction.operand(1 - position)
    same = other is contraction.operand(position)
    return other in activations and not same and (axis is None or contraction.sums_over(position, axis))


def _site(softmax: Softmax, scores: list[ir.Node], sums: list[_WeightedSum], graph: ir.Graph) -> FoundSite:
    first = sums[0]
    operator = f"{scores[0].op_type}-{softmax.spelling}-{first.contraction.node.op_type}"
    of_scores = Contraction.of(scores[0])
    head_dim = of_scores.summed_dimension() if of_scores else 0
    heads, kv_heads = _heads(first)
    reason = softmax.refused or _reason(softmax, sums, graph)
    if reason:
        return FoundSite(softmax.node, operator, heads, kv_heads, head_dim, Untappable(reason))
    assert first.axis is not None
    weights, of_weights = first.contraction.numbers_of(first.position)
    value, of_value = first.contraction.numbers_of(1 - first.position)
    output, of_output = first.contraction.numbers_of_output()
    probabilities = Probabilities(
        weights,
        first.axis,
        product=first.contraction.node,
        position=first.position,
        value=value,
        output=output,
        query_axes=first.query_axes,
        scores=tuple(scores),
        whole=first.whole and of_weights is None,
        of_weights=of_weights,
        of_value=of_value,
        of_output=of_output,
        levels=_levels(output, of_output),
    )
    return FoundSite(softmax.node, operator, heads, kv_heads, head_dim, probabilities)


def _levels(output: ir.Value, quantizer: Quantizer | None) -> Levels | None:
    """Return the numbers that the quantizer of integers rounds to; None where they are not known."""
    scale = constant_number(quantizer.scale) if quantizer is not None else None
    if quantizer is None or scale is None:
        return None
    zero = constant_number(quantizer.zero) if quantizer.zero is not None else 0.0
    dtype = quantizer.zero.dtype if quantizer.zero is not None else output.dtype
    if zero is None or dtype not in _INTEGERS:
        return None
    low, high = _INTEGERS[dtype]
    return Levels(scale, (low - zero) * scale, (high - zero) * scale)


def _reason(softmax: Softmax, sums: list[_WeightedSum], graph: ir.Graph) -> str:
    """Return why no tap can read the weights of such a site; empty where one can."""
    first = sums[0]
    if softmax.node.graph is not graph or first.contraction.node.graph is not graph:
        return "it is inside a subgraph, whose values the outer graph cannot read"
    if first.axis is None:
        return "its keys cannot be followed from softmax to the MatMul with the values"
    if first.part is not None and any(other.part is not first.part for other in sums):
        return "parts of its keys are multiplied with values in separate MatMuls"
    if not first.query_axes:
        return "its weights have no axis of queries"
    return ""


def _heads(weighted: _WeightedSum) -> tuple[int, int]:
    """Return the heads of query and key as shapes state them; 0 where only a run of the graph finds them."""
    axis, contraction = weighted.axis, weighted.contraction
    weights, value = contraction.operand(weighted.position), contraction.operand(1 - weighted.position)
    rank, own = rank_of(weights), weighted.query_axes
    if axis is None or rank is None or rank < 4 or not own:
        return 0, 0
    query = min(own, key=lambda place: abs(place - axis))
    heads = kv_heads = 1
    unknown = 0
    for place in range(-rank, 0):
        size, other = dimension_of(weights, place), contraction.counterpart(weighted.position, place)
        if place in {query, axis}:
            continue
        unknown += size is None
        heads *= size or 1
        kv_heads *= (dimension_of(value, other) or 1) if other is not None and size is not None else 1
    if unknown > 1:  # the batch alone
        return 0, 0
    kv_heads = _repeated_heads(value) or kv_heads
    return heads, kv_heads if heads % kv_heads == 0 else heads


def _repeated_heads(value: ir.Value) -> int:
    """Return K of a value that repeats K heads, (B, K, 1, S, D) -> (B, K, G, S, D) -> (B, H, S, D); 0 for others."""
    merged = producer_of(before(value, {"Cast", "Transpose", "Identity"}), "Reshape")
    repeated = producer_of(merged.inputs[0], "Expand") if merged is not None else None
    if repeated is None or rank_of(repeated.inputs[0]) != 5 or dimension_of(repeated.inputs[0], -3) != 1:
        return 0
    return dimension_of(repeated.inputs[0], -4) or 0
