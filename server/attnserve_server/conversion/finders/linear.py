r"""Find linear attention: phi(Q) (phi(K)^T V) / (phi(Q) . sum of phi(K)), written with MatMul or Einsum.

    phi(K)^T   V              phi(K)
         \    /                  |
      MatMul: the summary     ReduceSum over the keys
           \    phi(Q)  phi(Q)   /
            \   /           \  /
           MatMul            MatMul: the divisor
                \           /
                    Div

Any feature map phi will do. The form is recognized by two facts: one summary of keys and values serves all queries, and
the divisor is computed from the same queries and the sum of the same keys. The division may follow the second MatMul,
precede it (on the queries), or be a third operand of an Einsum. A causal sum over keys before the query, and features
without a divisor, are other forms and are not found. A site, a place in a graph that computes attention, whose number
of heads is not in the graph is yielded as `Untappable(reason)`. `find` raises nothing. Source: Katharopoulos et al.
2020, eq. 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from attnserve_server.conversion.base.sites import Features, FoundSite, Linear, Operand, Untappable
from attnserve_server.conversion.graphs.contraction import Contraction, Term
from attnserve_server.conversion.graphs.walk import axes_of, constant_ints, is_constant, is_standard, producer_of

_OPERATOR = "decomposed linear attention"
_LAYOUT = {"Transpose", "Unsqueeze", "Squeeze", "Reshape", "Identity", "Expand"}
_GUARDS = {"Add", "Max", "Clip", "Where"}
"""Operators, with a constant, that keep a divisor from 0."""
_ELEMENTWISE = {
    *("Add", "Sub", "Mul", "Div", "Max", "Min", "Where", "Cast", "Clip"),
    *("Elu", "Relu", "Exp", "Softplus", "Softmax", "Sigmoid", "Tanh", "Abs", "Sqrt", "Gelu"),
}
"""Operators of feature maps; they leave axes in their places."""


@dataclass(frozen=True, slots=True)
class _Summary:
    """The MatMul of queries and the summary of keys and values, in the letters of one einsum.

    Attributes:
        query: phi(Q), with the letters shared, rows, feature.
        key: phi(K): shared, keys, feature.
        value: V: shared, keys, column.
        output: the letters of the result: shared, rows, column, in its order.
        shared: the letters that all have: the batch, and the heads if they have an axis.
        rows, keys, feature, column: one letter each.
    """

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
    """Yield the sites of this form in the graph itself."""
    for node in graph:
        for product, divisor, inverse in _divided(node):
            summary = _summary(product)
            if summary is not None and _is_total(divisor, summary, inverse=inverse):
                yield _site(node, summary)
                break


def _divided(node: ir.Node) -> Iterator[tuple[Contraction, ir.Value, bool]]:
    """Yield each reading of a node as a contraction of two, a divisor, and whether it has the divisor's inverse."""
    for one, other in _scaled(node):
        product = _contraction(one.producer())
        if product is not None:
            yield product, other, node.op_type == "Mul"
    product = _contraction(node, most=3)
    if product is None:
        return
    for place, term in enumerate(product.terms):
        others = product.terms[:place] + product.terms[place + 1 :]
        if len(others) == 2:
            yield replace(product, terms=others), term.value, True
            continue
        scaling = term.value.producer()
        for one, divisor in _scaled(scaling):
            scaled = Term(one, term.letters).untransposed()
            inverse = scaling is not None and scaling.op_type == "Mul"
            yield replace(product, terms=(scaled, *others)), divisor, inverse


def _contraction(node: ir.Node | None, *, least: int = 1, most: int = 2) -> Contraction | None:
    """Return a MatMul or Einsum of the standard operators with a letter for every axis; None for other nodes."""
    if node is None or not is_standard(node) or node.op_type not in {"MatMul", "Einsum"}:
        return None
    found = Contraction.of(node, least=least, most=most)
    return found.spelled_out() if found is not None else None


def _scaled(node: ir.Node | None) -> list[tuple[ir.Value, ir.Value]]:
    """Return the value that a node scales and the factor or divisor; both orders where the node multiplies."""
    if node is None or node.op_type not in {"Div", "Mul"}:
        return []
    one, other = node.inputs
    if one is None or other is None:
        return []
    return [(one, other)] if node.op_type == "Div" else [(one, other), (other, one)]


def _summary(product: Contraction) -> _Summary | None:
    """Return a contraction of two as queries times the summary of keys and values; None where it is none."""
    if len(product.terms) != 2:
        return None
    for query, summed in (product.terms, product.terms[::-1]):
        inner = _contraction(summed.value.producer())
        if inner is None or len(inner.terms) != 2 or len(inner.output) != len(summed.letters):
            continue
        # One alphabet for both: that of the outer contraction, and digits for the letters that the inner one sums over.
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
    """Return whether a divisor is, for each query, its features times the sum of all keys' features."""
    value = _unguarded(divisor)
    if inverse:
        node = value.producer()
        if node is not None and node.op_type == "Mul":  # torch writes 1.0 / x as the reciprocal of x times 1.0
            activations = [each for each in node.inputs if each is not None and not is_constant(each)]
            node = activations[0].producer() if len(activations) == 1 else None
        if node is None or node.op_type not in {"Reciprocal", "Div"}:
            return False
        source = node.inputs[0] if node.op_type == "Reciprocal" else node.inputs[1]
        if source is None or (node.op_type == "Div" and not is_constant(node.inputs[0])):
            return False
        value = _unguarded(source)
    node = value.producer()
    if node is not None and node.op_type == "ReduceSum" and node.inputs[0] is not None:
        node = _unguarded(node.inputs[0]).producer()
        pair = list(node.inputs) if node is not None and node.op_type == "Mul" else []
    else:
        found = _contraction(node)
        pair = [term.value for term in found.terms] if found is not None else []
    return len(pair) == 2 and any(
        one is not None and other is not None and _is_query(one, summary) and _is_sum_of_keys(other, summary)
        for one, other in (pair, pair[::-1])
    )


def _is_query(value: ir.Value, summary: _Summary) -> bool:
    return Term(value, summary.query.letters).untransposed().value is summary.query.value


def _is_sum_of_keys(value: ir.Value, summary: _Summary) -> bool:
    node = _unguarded(value).producer()
    if node is None or node.inputs[0] is None:
        return False
    if node.op_type == "Einsum":
        found = _contraction(node, most=1)
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


def _sizes(term: Term, depth: int = 8) -> dict[str, int]:
    """Return the sizes of a value's axes, by letter, as its shape states them, or the Reshape behind it.

    Exporters that infer no shapes still state the heads in the Reshape that splits them.
    """
    found: dict[str, int] = {}
    shape: Iterable[object] = term.value.shape if term.value.shape is not None else ()
    node = term.value.producer()
    if node is not None and node.op_type == "Reshape":
        parts = producer_of(node.inputs[1], "Concat")
        if parts is not None:
            numbers = [constant_ints(part) or [0] for part in parts.inputs]
            shape = [each[0] for each in numbers] if all(len(each) == 1 for each in numbers) else shape
    elif node is not None and node.op_type in _ELEMENTWISE and depth:
        for value in node.inputs:
            if value is not None and not is_constant(value):
                part = _sizes(Term(value, term.letters).untransposed(), depth - 1)
                # A size of 1 may broadcast to another operand, whose size is not known.
                found |= {letter: size for letter, size in part.items() if size > 1}
    stated = zip(term.letters, shape, strict=False)
    return found | {letter: size for letter, size in stated if isinstance(size, int) and size > 0}


def _unguarded(value: ir.Value) -> ir.Value:
    """Return the value before layout changes, and before guards that keep a divisor from 0."""
    while (node := value.producer()) is not None:
        if node.op_type in _LAYOUT:
            source = node.inputs[0]
        elif node.op_type in _GUARDS:
            sources = [each for each in node.inputs if each is not None and not is_constant(each)]
            source = sources[0] if len(sources) == 1 else None
        else:
            break
        if source is None:
            break
        value = source
    return value


def _site(node: ir.Node, summary: _Summary) -> FoundSite:
    """Return the site; the letters state which axis of each operand is which."""
    sizes: dict[str, int] = {}
    for term in (summary.query, summary.key, summary.value):
        sizes |= _sizes(term)
    # The first shared axis is the batch; the other one, if there is one, the heads.
    batch, head = summary.shared[0], summary.shared[1:]
    heads = sizes.get(head, 0) if head else 1
    head_dim = sizes.get(summary.feature, 0)
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
