"""Products of two values, by MatMul, Gemm or Einsum: which axis comes from which operand, and which is summed over."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from attnserve_server.conversion.finders.decomposed_walk import extent_of, rank_of

_PLAIN = {("MatMul", ""), ("MatMul", "ai.onnx"), ("MatMulInteger", ""), ("MatMulIntegerToFloat", "com.microsoft")}
_TURNED = {("Gemm", ""), ("Gemm", "ai.onnx"), ("FusedMatMul", "com.microsoft")}
_MOST_HEADS = 128
_TO_FLOATING = {"MatMulInteger": ("Cast", "Mul"), "QLinearMatMul": ("DequantizeLinear",)}


@dataclass(frozen=True, slots=True)
class Product:
    """A product as an einsum: a letter for each axis; "." stands for all axes in front of those with letters.

    `inputs`: which of the node's inputs are its operands.
    """

    node: ir.Node
    terms: tuple[str, str]
    output: str
    inputs: tuple[int, int] = (0, 1)

    @classmethod
    def of(cls, node: ir.Node) -> Product | None:
        """The node as a product of two values, if it is one."""
        if len(node.inputs) < 2 or any(value is None for value in node.inputs[:2]):
            return None
        if node.op_type == "Einsum" and len(node.inputs) == 2:
            return _einsum(node)
        if (node.op_type, node.domain) in _PLAIN:
            return cls(node, (".ij", ".jk"), ".ik")
        if node.op_type == "QLinearMatMul":
            return cls(node, (".ij", ".jk"), ".ik", (0, 3))
        return _turned(node) if (node.op_type, node.domain) in _TURNED else None

    @property
    def equation(self) -> str:
        """In the notation of einsum."""
        return f"{self.terms[0]},{self.terms[1]}->{self.output}".replace(".", "...")

    def operand(self, position: int) -> ir.Value:
        """The left (0) or right (1) one."""
        value = self.node.inputs[self.inputs[position]]
        assert value is not None
        return value

    def floating(self, position: int) -> ir.Value:
        """An operand before it was quantised for the product."""
        value = self.operand(position)
        node = value.producer()
        if node is not None and node.op_type in {"QuantizeLinear", "DynamicQuantizeLinear"}:
            return node.inputs[0] or value
        return value

    def floating_output(self) -> ir.Value:
        """The product once it is no longer quantised."""
        value = self.node.outputs[0]
        for step in _TO_FLOATING.get(self.node.op_type, ()):
            value = next((node.outputs[0] for node in value.consumers() if node.op_type == step), value)
        return value

    def sums_over(self, position: int, axis: int) -> bool:
        """Whether the product sums over an axis of an operand, along with one of the other operand."""
        letter = _letter(self.terms[position], axis)
        return letter != "" and letter in self.terms[1 - position] and letter not in self.output

    def counterpart(self, position: int, axis: int) -> int | None:
        """The axis of the other operand that runs along with one of an operand."""
        term, other = self.terms[position], self.terms[1 - position]
        letter = _letter(term, axis)
        if letter:
            return other.index(letter) - len(other) if letter in other else None
        in_front = axis + len(term) - 1 if "." in term else 0
        return in_front - len(other) + 1 if in_front <= 0 and "." in other else None

    def sources(self, axis: int) -> tuple[bool, bool]:
        """Whether an axis of the output comes from the left operand, and whether from the right."""
        letter = _letter(self.output, axis)
        return tuple(letter != "" and letter in term for term in self.terms)  # type: ignore[return-value]

    def kept(self, position: int) -> tuple[int, ...]:
        """The axes of an operand that are in the output and not in the other operand: those that it brings along."""
        term, other = self.terms[position], self.terms[1 - position]
        return tuple(
            place - len(term) for place, letter in enumerate(term) if letter not in other and letter in self.output
        )

    def rows_of_constant(self, position: int) -> int:
        """How many vectors a constant operand holds, one for each query: at least 2 where that is not known."""
        value, term = self.operand(position), self.terms[position]
        count = 1
        for place in range(-(rank_of(value) or len(term)), 0):
            if not self.sums_over(position, place):
                extent = extent_of(value, place)
                count *= 2 if extent is None else extent
        return count

    def summed_extent(self) -> int:
        """How many numbers are multiplied and summed for each of the output, 0 where the graph does not say."""
        for position, term in enumerate(self.terms):
            for place in range(-len(term), 0):
                if self.sums_over(position, place) and (extent := extent_of(self.operand(position), place)):
                    return extent
        return 0


def _letter(term: str, axis: int) -> str:
    letter = term[axis] if -axis <= len(term) else ""
    return "" if letter == "." else letter


def _einsum(node: ir.Node) -> Product | None:
    equation = node.attributes.get_string("equation", "").replace(" ", "").replace("...", ".")
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    if not arrow:
        letters = [letter for letter in sorted(set(inputs)) if letter not in ",." and inputs.count(letter) == 1]
        output = ("." if "." in inputs else "") + "".join(letters)
    return Product(node, (terms[0], terms[1]), output)


def _turned(node: ir.Node) -> Product | None:
    """A product that may turn its operands first."""
    if node.attributes.get_int("transBatchA", 0) or node.attributes.get_int("transBatchB", 0):
        return None
    front = "" if node.op_type == "Gemm" else "."
    left = "ji" if node.attributes.get_int("transA", 0) else "ij"
    right = "kj" if node.attributes.get_int("transB", 0) else "jk"
    return Product(node, (front + left, front + right), front + "ik")


def mixes_heads(node: ir.Node, position: int) -> bool:
    """Whether a node mixes the heads of scores or weights, (B, L, S, H) @ (H, H) or a convolution of size 1.

    Source: Shazeer et al. 2020, "Talking-Heads Attention".
    """
    table = node.inputs[1] if len(node.inputs) > 1 else None
    if position != 0 or table is None or rank_of(node.inputs[0]) != 4:
        return False
    kernel = {"MatMul": 2, "Conv": 4}.get(node.op_type)
    if kernel is None or kernel != rank_of(table):
        return False
    heads = [extent_of(table, axis) for axis in (-kernel, 1 - kernel)]
    apart = [extent_of(table, axis) for axis in range(2 - kernel, 0)]
    return heads[0] == heads[1] and 1 < (heads[0] or 0) <= _MOST_HEADS and all(extent == 1 for extent in apart)
