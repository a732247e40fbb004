"""Finds linear attention: phi(Q) (phi(K)^T V), divided by phi(Q) . sum of phi(K), as MatMul or Einsum spell it.

The feature maps may be any: what makes the form is that one product of keys and values serves all queries, and that the
divisor is made of the same queries and the sum of the same keys. The division may stand behind the product, before it
(on the queries), or inside a product of three. Not of this form, and so not found: a causal sum over keys before the
query, and features without a divisor. Source: Katharopoulos et al. 2020, eq. 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from attnserve_server.conversion.base.sites import Features, FoundSite, Linear, Operand, Untappable
from attnserve_server.conversion.finders.decomposed_walk import axes_of, constant_ints
from attnserve_server.conversion.finders.linear_terms import Contraction, Term, contraction

_OPERATOR = "decomposed linear attention"
_SHAPING = {"Transpose", "Unsqueeze", "Squeeze", "Reshape", "Identity", "Expand"}
_GUARDS = {"Add", "Max", "Clip", "Where"}
"""What keeps a divisor from 0."""
_ELEMENTWISE = {
    *("Add", "Sub", "Mul", "Div", "Max", "Min", "Where", "Cast", "Clip"),
    *("Elu", "Relu", "Exp", "Softplus", "Softmax", "Sigmoid", "Tanh", "Abs", "Sqrt", "Gelu"),
}
"""What feature maps are made of, and leaves axes in their places."""


@dataclass(frozen=True, slots=True)
class _Summary:
    """Queries by the summary of keys and values; letters: each of the roles is one, and `shared` are in all."""

    query: Term
    key: Term
    value: Term
    output: str
    shared: str
    rows: str
    keys: str
    feature: str
    column: str


def find(graph: ir.Graph) -> Iterator[FoundSite]:
    """All places where a graph computes attention in this form."""
    for node in graph:
        for product, divisor, inverse in _divided(node):
            summary = _summary(product)
            if summary is not None and _is_total(divisor, summary, inverse=inverse):
                yield _site(node, summary)
                break


def _divided(node: ir.Node) -> Iterator[tuple[Contraction, ir.Value, bool]]:
    """What a node may be: a product of two, a divisor of it, and whether that is there as its inverse."""
    for one, other in _scaled(node):
        product = contraction(one.producer())
        if product is not None:
            yield product, other, node.op_type == "Mul"
    product = contraction(node, most=3)
    if product is None:
        return
    for place, term in enumerate(product.terms):
        others = product.terms[:place] + product.terms[place + 1 :]
        if len(others) == 2:
            yield Contraction(node, others, product.output), term.value, True
            continue
        scaling = term.value.producer()
        for one, divisor in _scaled(scaling):
            scaled = Term(one, term.letters).untransposed()
            yield (
                Contraction(node, (scaled, *others), product.output),
                divisor,
                scaling is not None and scaling.op_type == "Mul",
            )


def _scaled(node: ir.Node | None) -> list[tuple[ir.Value, ir.Value]]:
    """What a node scales, and by what: either way round where it multiplies."""
    if node is None or node.op_type not in {"Div", "Mul"}:
        return []
    one, other = node.inputs
    if one is None or other is None:
        return []
    return [(one, other)] if node.op_type == "Div" else [(one, other), (other, one)]


def _summary(product: Contraction) -> _Summary | None:
    if len(product.terms) != 2:
        return None
    for query, summed in (product.terms, product.terms[::-1]):
        inner = contraction(summed.value.producer())
        if inner is None or len(inner.terms) != 2 or len(inner.output) != len(summed.letters):
            continue
        # One alphabet for both products: that of the outer one, and letters of no other meaning for what is summed.
        names = dict(zip(inner.output, summed.letters, strict=True))
        gone = {letter for term in inner.terms for letter in term.letters} - set(inner.output)
        names |= {letter: str(number) for number, letter in enumerate(sorted(gone))}
        terms = [term.renamed(names) for term in inner.terms]
        for key, value in (terms, terms[::-1]):
            found = _roles(query, key, value, product.output)
            if found is not None:
                return found
    return None


def _roles(query: Term, key: Term, value: Term, output: str) -> _Summary | None:
    of_query, of_key, of_value, of_output = (
        set(letters) for letters in (query.letters, key.letters, value.letters, output)
    )
    shared = of_query & of_key & of_value & of_output
    rows, keys = (of_query & of_output) - shared, (of_key & of_value) - shared
    feature, column = (of_query & of_key) - shared, (of_value & of_output) - shared
    if any(len(role) != 1 for role in (rows, keys, feature, column)) or not 1 <= len(shared) <= 2:
        return None
    if (of_query, of_key) != (shared | rows | feature, shared | keys | feature):
        return None
    if (of_value, of_output) != (shared | keys | column, shared | rows | column):
        return None
    ordered = "".join(letter for letter in output if letter in shared)
    return _Summary(query, key, value, output, ordered, *rows, *keys, *feature, *column)


def _is_total(divisor: ir.Value, summary: _Summary, *, inverse: bool) -> bool:
    """Whether a divisor is, for each query, its features by the sum of all keys' features."""
    value = _bare(divisor)
    if inverse:
        node = value.producer()
        if node is not None and node.op_type == "Mul":  # 1.0 / x is written as the reciprocal of x by 1.0
            plain = [each for each in node.inputs if each is not None and not _is_constant(each)]
            node = plain[0].producer() if len(plain) == 1 else None
        if node is None or node.op_type not in {"Reciprocal", "Div"}:
            return False
        source = node.inputs[0] if node.op_type == "Reciprocal" else node.inputs[1]
        if source is None or (node.op_type == "Div" and not _is_constant(node.inputs[0])):
            return False
        value = _bare(source)
    node = value.producer()
    if node is not None and node.op_type == "ReduceSum" and node.inputs[0] is not None:
        node = _bare(node.inputs[0]).producer()
        pair = list(node.inputs) if node is not None and node.op_type == "Mul" else []
    else:
        found = contraction(node)
        pair = [term.value for term in found.terms] if found is not None else []
    return len(pair) == 2 and any(
        one is not None and other is not None and _is_query(one, summary) and _is_sum_of_keys(other, summary)
        for one, other in (pair, pair[::-1])
    )


def _is_query(value: ir.Value, summary: _Summary) -> bool:
    return Term(value, summary.query.letters).untransposed().value is summary.query.value


def _is_sum_of_keys(value: ir.Value, summary: _Summary) -> bool:
    node = _bare(value).producer()
    if node is None or node.inputs[0] is None:
        return False
    if node.op_type == "Einsum":
        found = contraction(node, most=1)
        if found is None or found.terms[0].value is not summary.key.value:
            return False
        gone = [place for place, letter in enumerate(found.terms[0].letters) if letter not in found.output]
        return gone == [summary.key.letters.index(summary.keys)]
    rank = len(summary.key.letters)
    axes = axes_of(node)
    if node.op_type != "ReduceSum" or axes is None or len(axes) != 1:
        return False
    places = Term(node.inputs[0], "".join(map(chr, range(rank)))).untransposed()
    return (
        places.value is summary.key.value
        and ord(places.letters[summary.key.letters.index(summary.keys)]) == axes[0] % rank
    )


def _extents(term: Term, depth: int = 8) -> dict[str, int]:
    """The extents of a value's axes that the graph tells: by its shape, or by that which its parts were brought into.

    Exporters that infer no shapes still say heads where they part them.
    """
    found: dict[str, int] = {}
    shape: Iterable[object] = term.value.shape if term.value.shape is not None else ()
    node = term.value.producer()
    if node is not None and node.op_type == "Reshape":
        wanted = node.inputs[1]
        parts = wanted.producer() if wanted is not None else None
        if parts is not None and parts.op_type == "Concat":
            numbers = [constant_ints(part) or [0] for part in parts.inputs]
            shape = [each[0] for each in numbers] if all(len(each) == 1 for each in numbers) else shape
    elif node is not None and node.op_type in _ELEMENTWISE and depth:
        for value in node.inputs:
            if value is not None and not _is_constant(value):
                part = _extents(Term(value, term.letters).untransposed(), depth - 1)
                # A part of extent 1 may be spread over another, whose extent is not known.
                found |= {letter: extent for letter, extent in part.items() if extent > 1}
    said = zip(term.letters, shape, strict=False)
    return found | {letter: extent for letter, extent in said if isinstance(extent, int) and extent > 0}


def _bare(value: ir.Value) -> ir.Value:
    """A value before what merely reshapes it, or keeps it from 0."""
    while (node := value.producer()) is not None:
        if node.op_type in _SHAPING:
            source = node.inputs[0]
        elif node.op_type in _GUARDS:
            sources = [each for each in node.inputs if each is not None and not _is_constant(each)]
            source = sources[0] if len(sources) == 1 else None
        else:
            break
        if source is None:
            break
        value = source
    return value


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and ir.convenience.get_const_tensor(value) is not None


def _site(node: ir.Node, summary: _Summary) -> FoundSite:
    """The site, with every operand's axes told by its letters."""
    extents: dict[str, int] = {}
    for term in (summary.query, summary.key, summary.value):
        extents |= _extents(term)
    # The batch is the shared axis that comes first; attention over all heads at once has no other.
    batch, head = summary.shared[0], summary.shared[1:]
    heads = extents.get(head, 0) if head else 1
    head_dim = extents.get(summary.feature, 0)
    if not heads:
        reason = Untappable("its number of heads is not in the graph")
        return FoundSite(node, _OPERATOR, 1, 1, head_dim, reason, form="linear")

    def features(term: Term, position: str, last: str) -> Features:
        return Features(term.value, tuple(term.letters.index(letter) for letter in (batch, *head, position, last)))

    value = features(summary.value, summary.keys, summary.column)
    output = features(Term(node.outputs[0], summary.output), summary.rows, summary.column)
    attention = Linear(
        query=features(summary.query, summary.rows, summary.feature),
        key=features(summary.key, summary.keys, summary.feature),
        value=Operand(value.value, heads, packed=False, order=value.order),
        output=Operand(output.value, heads, packed=False, order=output.order),
    )
    return FoundSite(node, _OPERATOR, heads, heads, head_dim, attention, form="linear")
