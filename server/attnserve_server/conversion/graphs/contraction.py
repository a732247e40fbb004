"""MatMul, Gemm, Einsum and their integer forms in one notation, that of einsum: one letter for each axis.

    MatMul of (B, H, L, D) and (B, H, D, S)    .ij,.jk->.ik    sums over j; i comes from the left, k from the right

"." is the ellipsis: all axes in front of those that have letters. The module knows nothing of attention. For a graph
that onnx has checked, nothing here raises.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from attnserve_server.conversion.base.quantizers import Quantizer
from attnserve_server.conversion.graphs.walk import (
    constant_number,
    dimension_of,
    input_of,
    is_standard,
    permutation_of,
    rank_of,
)

_MATMULS = {"MatMul": "", "MatMulInteger": "", "MatMulIntegerToFloat": "com.microsoft"}
"""Operators of .ij,.jk->.ik on their first two inputs, and their domain; "" is the standard one."""
_TRANSPOSING = {"Gemm": "", "FusedMatMul": "com.microsoft"}
"""Operators that may transpose an operand first, as their attributes state."""
_TO_FLOAT = {"MatMulInteger": ("Cast", "Mul")}
"""By integer operator, the nodes behind it that make its result floating point again."""


@dataclass(frozen=True, slots=True)
class Term:
    """An operand, with a letter for each of its axes."""

    value: ir.Value
    letters: str

    def renamed(self, names: dict[str, str]) -> Term:
        """Return the term with other letters, where `names` has them."""
        return Term(self.value, "".join(names.get(letter, letter) for letter in self.letters))

    def untransposed(self) -> Term:
        """Return the value before its transpositions, each letter still with its axis."""
        value, letters = self.value, self.letters
        while (node := value.producer()) is not None and node.op_type in {"Transpose", "Identity"}:
            if node.op_type == "Transpose":
                order = permutation_of(node) or list(range(len(letters)))[::-1]
                if len(order) != len(letters):
                    break
                letters = "".join(letters[order.index(place)] for place in range(len(order)))
            source = node.inputs[0]
            assert source is not None
            value = source
        return Term(value, letters)


@dataclass(frozen=True, slots=True)
class Contraction:
    """A node that multiplies its operands and sums over every letter that its output does not have.

    `inputs`: which of the node's inputs the terms are, in order.
    """

    node: ir.Node
    terms: tuple[Term, ...]
    output: str
    inputs: tuple[int, ...] = (0, 1)

    @classmethod
    def of(cls, node: ir.Node | None, *, least: int = 2, most: int = 2) -> Contraction | None:
        """Return the node as a contraction of `least` to `most` operands; None where it is none."""
        if node is None:
            return None
        if node.op_type == "Einsum":
            return _einsum(node) if least <= len(node.inputs) <= most else None
        if not least <= 2 <= most:
            return None
        if node.op_type == "QLinearMatMul":
            return _with_letters(node, (".ij", ".jk"), ".ik", (0, 3))
        if _is(node, _MATMULS):
            return _with_letters(node, (".ij", ".jk"), ".ik")
        return _transposing(node) if _is(node, _TRANSPOSING) else None

    @property
    def letters(self) -> tuple[str, ...]:
        """The letters of each operand."""
        return tuple(term.letters for term in self.terms)

    @property
    def equation(self) -> str:
        """The contraction as NumPy's einsum takes it."""
        return f"{','.join(self.letters)}->{self.output}".replace(".", "...")

    def spelled_out(self) -> Contraction | None:
        """Return the contraction without an ellipsis, of operands before their transpositions.

        None where the number of axes of the ellipsis is not known or differs between operands, and where an operand has
        a letter twice.
        """
        with_ellipsis = [term for term in self.terms if "." in term.letters]
        axes = ""
        if with_ellipsis:
            ranks = [(rank_of(term.value), len(term.letters) - 1) for term in with_ellipsis]
            beyond = {rank - own for rank, own in ranks if rank is not None}
            if len(beyond) != 1 or min(beyond) < 0:
                return None
            unused = [letter for letter in string.ascii_uppercase if letter not in self.equation]
            axes = "".join(unused[: beyond.pop()])
        terms = [Term(term.value, term.letters.replace(".", axes)) for term in self.terms]
        if any(len(set(term.letters)) != len(term.letters) for term in terms):
            return None
        untransposed = tuple(term.untransposed() for term in terms)
        return replace(self, terms=untransposed, output=self.output.replace(".", axes))

    def operand(self, position: int) -> ir.Value:
        """Return the left (0) or the right (1) operand."""
        return self.terms[position].value

    def numbers_of(self, position: int) -> tuple[ir.Value, Quantizer | None]:
        """Return an operand, in integers with their quantizer where a constant one rounds it.

        An operand that a quantizer rounds whose scale follows the input is returned before it is rounded.
        """
        value = self.operand(position)
        if self.node.op_type == "QLinearMatMul":
            scale, zero = (input_of(self.node, self.inputs[position] + place) for place in (1, 2))
            return (value, Quantizer(scale, zero)) if scale is not None and _is_single(scale) else (value, None)
        node = value.producer()
        if node is not None and node.op_type == "DynamicQuantizeLinear":
            return node.inputs[0] or value, None
        if node is not None and node.op_type == "DequantizeLinear" and (quantizer := quantizer_of(node)):
            return node.inputs[0] or value, quantizer
        if node is not None and node.op_type == "QuantizeLinear" and (quantizer := quantizer_of(node)):
            return value, quantizer
        return value, None

    def numbers_of_output(self) -> tuple[ir.Value, Quantizer | None]:
        """Return the result, in integers with their quantizer where a constant one is all that reads it."""
        value = self.node.outputs[0]
        if self.node.op_type == "QLinearMatMul":
            scale, zero = input_of(self.node, 6), input_of(self.node, 7)
            return (value, Quantizer(scale, zero)) if scale is not None and _is_single(scale) else (value, None)
        for op_type in _TO_FLOAT.get(self.node.op_type, ()):
            value = next((node.outputs[0] for node in value.consumers() if node.op_type == op_type), value)
        users = list(value.consumers())
        if len(users) == 1 and users[0].op_type == "QuantizeLinear" and not value.is_graph_output():
            quantizer = quantizer_of(users[0])
            if quantizer is not None:
                return users[0].outputs[0], quantizer
        return value, None

    def sums_over(self, position: int, axis: int) -> bool:
        """Return whether the node sums over an axis of an operand together with one of the other operand."""
        letter = _letter(self.terms[position].letters, axis)
        return letter != "" and letter in self.terms[1 - position].letters and letter not in self.output

    def counterpart(self, position: int, axis: int) -> int | None:
        """Return the axis of the other operand that has the letter of this one's axis, counted from the end."""
        own, other = self.terms[position].letters, self.terms[1 - position].letters
        letter = _letter(own, axis)
        if letter:
            return other.index(letter) - len(other) if letter in other else None
        in_front = axis + len(own) - 1 if "." in own else 0
        return in_front - len(other) + 1 if in_front <= 0 and "." in other else None

    def sources(self, axis: int) -> tuple[bool, bool]:
        """Return whether an axis of the output is one of the left operand, and whether it is one of the right."""
        letter = _letter(self.output, axis)
        left, right = (letter != "" and letter in term.letters for term in self.terms)
        return left, right

    def own_axes(self, position: int) -> tuple[int, ...]:
        """Return the axes of an operand that the output has and the other operand has not, counted from the end."""
        own, other = self.terms[position].letters, self.terms[1 - position].letters
        kept = [letter not in other and letter in self.output for letter in own]
        return tuple(place - len(own) for place, keeps in enumerate(kept) if keeps)

    def vectors_in(self, position: int) -> int:
        """Return how many vectors of summed-over numbers an operand holds; an unknown size counts as 2."""
        value = self.operand(position)
        count = 1
        for place in range(-(rank_of(value) or len(self.terms[position].letters)), 0):
            if not self.sums_over(position, place):
                dimension = dimension_of(value, place)
                count *= 2 if dimension is None else dimension
        return count

    def summed_dimension(self) -> int:
        """Return how many numbers are summed for each number of the output; 0 where the graph does not state it."""
        for position, term in enumerate(self.terms):
            for place in range(-len(term.letters), 0):
                if self.sums_over(position, place) and (dimension := dimension_of(term.value, place)):
                    return dimension
        return 0


def _is(node: ir.Node, operators: dict[str, str]) -> bool:
    domain = operators.get(node.op_type)
    return domain is not None and (node.domain == domain or (domain == "" and is_standard(node)))


def quantizer_of(node: ir.Node) -> Quantizer | None:
    """Return the quantizer of a QuantizeLinear or DequantizeLinear with one scale for all elements; else None."""
    scale = input_of(node, 1)
    if scale is None or not _is_single(scale) or node.attributes.get_int("block_size", 0) != 0:
        return None
    return Quantizer(scale, input_of(node, 2), node.domain)


def _is_single(scale: ir.Value) -> bool:
    """Return whether a scale is a constant of one number."""
    return constant_number(scale) is not None


def _letter(letters: str, axis: int) -> str:
    """Return the letter of an axis; empty where it is one of the ellipsis."""
    letter = letters[axis] if -axis <= len(letters) else ""
    return "" if letter == "." else letter


def _with_letters(
    node: ir.Node, letters: Sequence[str], output: str, inputs: tuple[int, ...] = (0, 1)
) -> Contraction | None:
    """None where an operand is left out."""
    values = [input_of(node, place) for place in inputs]
    terms = tuple(Term(value, own) for value, own in zip(values, letters, strict=True) if value is not None)
    return Contraction(node, terms, output, inputs) if len(terms) == len(inputs) else None


def _einsum(node: ir.Node) -> Contraction | None:
    """Source: ONNX operators, Einsum-12; without an arrow, the output has the letters that stand once, in order."""
    equation = node.attributes.get_string("equation", "").replace(" ", "").replace("...", ".")
    inputs, arrow, output = equation.partition("->")
    letters = inputs.split(",")
    if len(letters) != len(node.inputs):
        return None
    if not arrow:
        once = [letter for letter in sorted(set(inputs)) if letter not in ",." and inputs.count(letter) == 1]
        output = ("." if "." in inputs else "") + "".join(once)
    return _with_letters(node, letters, output, tuple(range(len(letters))))


def _transposing(node: ir.Node) -> Contraction | None:
    """None where batch axes are transposed too."""
    if node.attributes.get_int("transBatchA", 0) or node.attributes.get_int("transBatchB", 0):
        return None
    front = "" if node.op_type == "Gemm" else "."
    left = "ji" if node.attributes.get_int("transA", 0) else "ij"
    right = "kj" if node.attributes.get_int("transB", 0) else "jk"
    return _with_letters(node, (front + left, front + right), front + "ik")
