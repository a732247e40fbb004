"""Collects the equations that the nodes of a graph force on the sizes of its inputs, and solves them for axis symbols.

The sizes of values are polynomials of axis symbols, as the interpreter of the proof computes them. An example, an image
encoder whose file names all axes of `pixel_values`:

    Conv      num_channels channels meet a weight of 3                 num_channels = 3
    Reshape   (B, D, h', w') to (B, D, h' w'), h' = floor((height - 16) / 16) + 1
    Add       h' w' + 1 positions meet a table of 197                  height = width = 224, if the image is square

An equation is a proposal, because an axis of one position broadcasts. `solving` runs the graph on each solution.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd, inf, lcm
from typing import Final

import onnx
import onnx_ir as ir

from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.conversion.proof.context import Context
from attnserve_server.conversion.proof.given import values_of_inputs
from attnserve_server.conversion.proof.helpers import attribute
from attnserve_server.conversion.proof.interpret import Interpreter
from attnserve_server.conversion.proof.layout import size_of
from attnserve_server.conversion.proof.sizes import ONE, Atom, Size, product
from attnserve_server.conversion.proof.values import Value
from attnserve_server.model.manifest import BATCH

_BROADCASTING: Final = frozenset(
    ("Add", "And", "Div", "Equal", "Greater", "Less", "Max", "Mean", "Min", "Mul", "Or", "Pow", "Sub", "Sum", "Where")
)
_PRODUCTS: Final = frozenset(("DynamicQuantizeMatMul", "MatMul", "MatMulInteger", "MatMulIntegerToFloat"))
_SCALED_LAST: Final = frozenset(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"))
_KEYS_AND_MASK: Final = {"Attention": (1, 3), "MultiHeadAttention": (1, 4)}
"""Of attention operators: the places of the keys, and of a mask whose last axis is theirs."""
_ROOMY: Final = 64
"""The least length of a float axis while equations are collected, so that windows of convolutions fit into it."""
_MOST_SIZE: Final = 4096
"""The greatest size that is tried for an axis whose equation has quotients."""

Shape = list[Size] | None


@dataclass(frozen=True, slots=True)
class Equation:
    """Two sizes that a node needs to be equal, and the node in words."""

    one: Size
    other: Size
    where: str

    def __str__(self) -> str:
        """Return the relation with its reason."""
        return f"{self.one} = {self.other}, because of {self.where}"

    @property
    def symbols(self) -> frozenset[str]:
        """The symbols that it relates."""
        return self.one.symbols | self.other.symbols

    def holds(self, lengths: Mapping[str, int]) -> bool | None:
        """Return whether both sizes are equal at these lengths; None where they cannot be computed."""
        one, other = evaluated(self.one, lengths), evaluated(self.other, lengths)
        return None if one is None or other is None else one == other


def equations_of(proto: onnx.ModelProto, signature: Signature) -> list[Equation]:
    """Return the equations that nodes force, in the order of the nodes, each once, and none that always holds.

    Args:
        proto: the graph.
        signature: of the graph; its symbols are the unknowns.
    """
    model = ir.from_proto(proto)
    floats = {each for spec in signature.inputs if spec.dtype.startswith("float") for each in spec.shape}
    roomy = {symbol: _ROOMY for symbol in signature.symbols if symbol in floats}
    ctx = Context("", {}, opset=model.opset_imports.get("", 23), bounds=False, shortest=roomy)
    interpreter = Interpreter(ctx)
    interpreter.run(model.graph, values_of_inputs(ctx, model.graph, signature, {}))
    found: dict[tuple[Size, Size], Equation] = {}
    for node in model.graph:
        values = [None if value is None else interpreter.value_of(value) for value in node.inputs]
        for one, other in _forced(node, values):
            known = Equation(one, other, f"{node.op_type} {node.name or node.outputs[0].name!r}")
            if one != other and known.symbols and BATCH not in known.symbols:
                found.setdefault((one, other), known)
    return list(found.values())


def _forced(node: ir.Node, values: Sequence[Value | None]) -> Iterator[tuple[Size, Size]]:
    """Yield the pairs of sizes that a node needs to be equal."""
    shapes = [_shape(value) for value in values]
    first, second = ([*shapes, None, None])[:2]
    if node.op_type in _BROADCASTING:
        yield from _broadcast([shape for shape in shapes if shape is not None])
    elif node.op_type == "MatMulNBits" and first is not None:
        yield first[-1], Size.of(int(attribute(node, "K", 0)))
    elif node.op_type == "Concat":
        yield from _concatenated(int(attribute(node, "axis", 0)), [shape for shape in shapes if shape is not None])
    elif node.op_type == "Reshape" and first is not None:
        yield from _reshaped(node, first, values[1] if len(values) > 1 else None)
    elif node.op_type == "Expand" and first is not None:
        target = values[1] if len(values) > 1 else None
        sizes = target.sizes if target is not None else None
        yield from _broadcast([first, [ONE if size is None else size for size in sizes or ()]])
    elif node.op_type in _KEYS_AND_MASK:
        key, mask = (shapes[at] if at < len(shapes) else None for at in _KEYS_AND_MASK[node.op_type])
        if key is not None and mask is not None and len(key) > 2 and len(mask) > 1:
            yield mask[-1], key[-2]
    elif first is not None and second is not None:
        yield from _multiplied(node, first, second)


def _multiplied(node: ir.Node, first: list[Size], second: list[Size]) -> Iterator[tuple[Size, Size]]:
    """Yield the pairs of a product of two operands, a convolution, or a normalization with its scale."""
    if node.op_type in _PRODUCTS and len(first) > 1 and len(second) > 1:
        yield first[-1], second[-2]
        yield from _broadcast([first[:-2], second[:-2]])
    elif node.op_type == "Gemm":
        yield first[0 if attribute(node, "transA", 0) else 1], second[1 if attribute(node, "transB", 0) else 0]
    elif node.op_type in {"Conv", "ConvInteger"} and len(first) > 1:
        yield first[1], second[1] * Size.of(int(attribute(node, "group", 1)))
    elif node.op_type in _SCALED_LAST and len(second) == 1:
        yield first[-1], second[0]


def _concatenated(axis: int, shapes: Sequence[list[Size]]) -> Iterator[tuple[Size, Size]]:
    for one, other in pairwise(shapes):
        if len(one) == len(other):
            yield from ((one[at], other[at]) for at in range(len(one)) if at != axis % len(one))


def _broadcast(shapes: Sequence[list[Size]]) -> Iterator[tuple[Size, Size]]:
    for back in range(1, max((len(shape) for shape in shapes), default=0) + 1):
        wide = [shape[-back] for shape in shapes if len(shape) >= back and shape[-back] != ONE]
        yield from pairwise(wide)


def _reshaped(node: ir.Node, shape: list[Size], target: Value | None) -> Iterator[tuple[Size, Size]]:
    """Yield the counts of elements before and behind a Reshape. Where it infers a size, that is taken for the batch."""
    sizes = list(target.sizes) if target is not None and target.sizes is not None else None
    if sizes is None or None in sizes:
        return
    zero_copies = not attribute(node, "allowzero", 0)
    whole = [size for size in sizes if size is not None]
    copied = [
        shape[at] if size.number == 0 and zero_copies and at < len(shape) else size for at, size in enumerate(whole)
    ]
    total, known = product(shape), product(size for size in copied if size.number != -1)
    if all(size.number != -1 for size in copied):
        yield _without_common(total, known)
    elif total.over(known) is None:
        rows = next((size for size in shape if size.symbols == {BATCH}), None)
        # Of an image that a convolution has cut. Windows of a sequence may be folded into the batch instead.
        cut = BATCH not in known.symbols and any(atom.divisor for atom in total.atoms.values())
        rest = total.over(rows) if cut and rows is not None else None
        yield _without_common(rest, known) if rest is not None else _multiple(*_without_common(total, known))


def _multiple(total: Size, known: Size) -> tuple[Size, Size]:
    """Return a symbol and its multiple of a new one, if a count of elements must be a multiple of a number for that."""
    terms = total.terms
    if known.number and len(terms) == 1 and len(terms[0][0]) == 1 and terms[0][0][0] in total.symbols:
        (symbol,), factor = terms[0]
        share = known.number // gcd(known.number, factor)
        part = f"{symbol}_by_{share}"
        return Size.atom(total.atoms[symbol]), Size.of(share) * Size.atom(Atom(part, frozenset({part}), 1, inf))
    return ONE, ONE


def _without_common(one: Size, other: Size) -> tuple[Size, Size]:
    """Divide two products by the factors that each term of both has, such as the batch."""
    for name in {name for monomial, _ in one.terms for name in monomial}:
        factor = Size.atom(one.atoms[name])
        while (left := one.over(factor)) is not None and (right := other.over(factor)) is not None and left.terms:
            one, other = left, right
    number = other.number
    if number and (left := one.over(other)) is not None:
        return left, ONE
    return one, other


def _shape(value: Value | None) -> Shape:
    return None if value is None or value.layout is None else [size_of(axis) for axis in value.layout]


def evaluated(size: Size, lengths: Mapping[str, int]) -> int | None:
    """Return a size as a number; None where it has a part other than sums, products and quotients of known symbols."""
    total = 0
    for monomial, factor in size.terms:
        part = factor
        for name in monomial:
            atom = size.atoms[name]
            if name in lengths:
                part *= lengths[name]
                continue
            dividend = None if atom.dividend is None else evaluated(atom.dividend, lengths)
            if dividend is None or not atom.divisor:
                return None
            part *= dividend // atom.divisor
        total += part
    return total


def strides_of(size: Size) -> int:
    """Return the least common multiple of the divisors of all quotients in a size, nested ones multiplied."""
    found = 1
    for atom in size.atoms.values():
        if atom.dividend is not None and atom.divisor:
            found = lcm(found, atom.divisor * strides_of(atom.dividend))
    return found


def isolated(equation: Equation, symbol: str) -> Size | None:
    """Return what a symbol equals by an equation; None where it is not a whole part of it."""
    rest = equation.one - equation.other
    own = [factor for monomial, factor in rest.terms if monomial == (symbol,)]
    if len(own) != 1 or abs(own[0]) != 1:
        return None
    found = Size.of(own[0]) * Size(tuple(term for term in rest.terms if term[0] != (symbol,)), rest.atoms)
    found = -found
    plain = all(name in found.symbols for monomial, _ in found.terms for name in monomial)
    return found if plain and symbol not in found.symbols else None


def common_size(equation: Equation) -> int | None:
    """Return the one size of all the symbols of an equation that solves it: a square image, or one axis alone.

    Of the sizes that differ by less than a stride, the greatest multiple of the strides in the equation is returned,
    else the greatest. None where no size solves it, or sizes further apart do.
    """
    fitting = [size for size in range(1, _MOST_SIZE + 1) if equation.holds(dict.fromkeys(equation.symbols, size))]
    step = lcm(strides_of(equation.one), strides_of(equation.other))
    if fitting and fitting[-1] - fitting[0] >= step:
        return None
    return max((size for size in fitting if size % step == 0), default=max(fitting, default=None))
