"""Products of values as einsum writes them, whichever operator computes them. Knows nothing of attention."""

from __future__ import annotations

import string
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Term:
    """A value with a letter for each of its axes."""

    value: ir.Value
    letters: str

    def renamed(self, names: dict[str, str]) -> Term:
        """With other letters, as far as they are named."""
        return Term(self.value, "".join(names.get(letter, letter) for letter in self.letters))

    def untransposed(self) -> Term:
        """The value before transpositions, with the letters where its axes were."""
        value, letters = self.value, self.letters
        while (node := value.producer()) is not None and node.op_type in {"Transpose", "Identity"}:
            if node.op_type == "Transpose":
                order = list(node.attributes.get_ints("perm", ())) or list(range(len(letters)))[::-1]
                if len(order) != len(letters):
                    break
                letters = "".join(letters[order.index(place)] for place in range(len(order)))
            source = node.inputs[0]
            assert source is not None
            value = source
        return Term(value, letters)


@dataclass(frozen=True, slots=True)
class Contraction:
    """A product of values that sums over the letters that its output has not; all values are untransposed."""

    node: ir.Node
    terms: tuple[Term, ...]
    output: str


def contraction(node: ir.Node | None, most: int = 2) -> Contraction | None:
    """What a node multiplies: a MatMul of two values of one rank, or an Einsum of at most so many values."""
    if node is None or node.domain not in {"", "ai.onnx"} or node.op_type not in {"MatMul", "Einsum"}:
        return None
    values = [value for value in node.inputs if value is not None]
    if len(values) != len(node.inputs) or not 1 <= len(values) <= most:
        return None
    ranks = [len(value.shape) if value.shape is not None else None for value in values]
    if node.op_type == "Einsum":
        return _einsum(node, values, ranks)
    rank = ranks[0]
    if rank is None or rank < 3 or ranks[1] != rank:
        return None
    shared = string.ascii_lowercase[: rank - 2]
    terms = (Term(values[0], f"{shared}yz"), Term(values[1], f"{shared}zx"))
    return Contraction(node, tuple(term.untransposed() for term in terms), f"{shared}yx")


def _einsum(node: ir.Node, values: list[ir.Value], ranks: list[int | None]) -> Contraction | None:
    equation = node.attributes.get_string("equation", "").replace(" ", "").replace("...", ".")
    inputs, arrow, output = equation.partition("->")
    letters = inputs.split(",")
    if len(letters) != len(values) or not arrow:
        return None
    spread = ""
    if "." in inputs:
        # What the ellipsis stands for: as many axes as a value has beyond its letters, the same for all.
        beyond = {
            rank - len(each) + 1 for each, rank in zip(letters, ranks, strict=True) if "." in each and rank is not None
        }
        if len(beyond) != 1 or min(beyond) < 0:
            return None
        unused = [letter for letter in string.ascii_uppercase if letter not in equation]
        spread = "".join(unused[: beyond.pop()])
    terms = [Term(value, each.replace(".", spread)) for value, each in zip(values, letters, strict=True)]
    if any(len(set(term.letters)) != len(term.letters) for term in terms):
        return None
    return Contraction(node, tuple(term.untransposed() for term in terms), output.replace(".", spread))
