"""Formulas of lengths: sums, products and quotients of axis symbols and whole numbers, parsed from text.

A text that is no formula, and a quotient with a remainder, raise `FormulaInvalid`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Final, Protocol, TypeVar

Result = TypeVar("Result")

_TOKEN: Final = re.compile(r"\s*(?:(?P<number>\d{1,9})|(?P<symbol>[A-Za-z_][A-Za-z0-9_.:]*)|(?P<sign>//|[-+*/()]))")
_MOST_CHARACTERS: Final = 200
"""The greatest length of a formula's text, which bounds the depth of its parentheses."""
_RANK: Final = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2}


class FormulaInvalid(ValueError):
    """A text that is no formula, or a quotient that is not a whole number."""


@dataclass(frozen=True)
class Formula:
    """A number, a symbol, or an operator with two operands. `/` divides without a remainder; `//` rounds down.

    Args:
        leaf: the number or the symbol; None for an operator.
        operator: `+`, `-`, `*`, `/` or `//`; empty for a leaf.
        operands: of the operator.
    """

    leaf: int | str | None
    operator: str = ""
    operands: tuple[Formula, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Formula:
        """Read a formula such as `past_sequence_length + 2 * sequence_length`.

        Raises:
            FormulaInvalid: the text is no formula, or has more than 200 characters.
        """
        if len(text) > _MOST_CHARACTERS:
            raise FormulaInvalid(
                f"{text[:40]!r}... has {len(text)} characters; a formula has {_MOST_CHARACTERS} at most"
            )
        tokens: list[str] = []
        at = 0
        while text[at:].strip():
            found = _TOKEN.match(text, at)
            if found is None:
                raise FormulaInvalid(f"{text!r} is no formula: it has {text[at:].strip()[0]!r}")
            tokens.append(found.group().strip())
            at = found.end()
        formula, rest = _sum(tokens, text)
        if rest:
            raise FormulaInvalid(f"{text!r} is no formula: {rest[0]!r} is not expected")
        return formula

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """Its symbols, each once, in the order of the text."""
        own = (self.leaf,) if isinstance(self.leaf, str) else ()
        return tuple(dict.fromkeys((*own, *(symbol for each in self.operands for symbol in each.symbols))))

    @cached_property
    def grows(self) -> bool:
        """Whether it has sums and products alone, so that its value is at least 1 and grows with each symbol."""
        least = self.leaf is None or isinstance(self.leaf, str) or self.leaf > 0
        return least and self.operator in {"", "+", "*"} and all(each.grows for each in self.operands)

    def fold(self, leaf: Callable[[int | str], Result], apply: Callable[[str, Result, Result], Result]) -> Result:
        """Compute a result from the leaves upwards. `apply` receives the operator and the results of both operands."""
        if self.leaf is not None:
            return leaf(self.leaf)
        one, other = (each.fold(leaf, apply) for each in self.operands)
        return apply(self.operator, one, other)

    def length_at(self, lengths: Mapping[Any, int]) -> int:
        """Return its value.

        Args:
            lengths: of every symbol that it has.

        Raises:
            FormulaInvalid: a quotient has a remainder, or divides by 0.
            KeyError: `lengths` lacks a symbol.
        """
        return self.fold(lambda leaf: leaf if isinstance(leaf, int) else lengths[leaf], self._applied)

    def _applied(self, operator: str, one: int, other: int) -> int:
        if operator in {"/", "//"} and (not other or (operator == "/" and one % other)):
            raise FormulaInvalid(f"{self} is not a whole number: {one} / {other}")
        return {
            "+": lambda: one + other,
            "-": lambda: one - other,
            "*": lambda: one * other,
            "/": lambda: one // other,
            "//": lambda: one // other,
        }[operator]()

    def replaced(self, known: Mapping[str, Formula]) -> Formula:
        """Return the formula with other formulas in the place of some symbols."""

        def leaf(own: int | str) -> Formula:
            return known.get(own, Formula(own)) if isinstance(own, str) else Formula(own)

        return self.fold(leaf, lambda operator, one, other: Formula(None, operator, (one, other)))

    def shown(self, lengths: Mapping[str, int]) -> str:
        """Return the text with the lengths in the place of symbols, such as `3 + 2 * 5`."""
        return str(self.replaced({symbol: Formula(length) for symbol, length in lengths.items()}))

    def __str__(self) -> str:
        """Return the text from which `parse` reads an equal formula."""
        if self.leaf is not None:
            return str(self.leaf)
        one, other = self.operands
        rank = _RANK[self.operator]
        left = f"({one})" if one.operator and _RANK[one.operator] < rank else str(one)
        right = f"({other})" if other.operator and _RANK[other.operator] <= rank else str(other)
        return f"{left} {self.operator} {right}"


@lru_cache(maxsize=1024)
def parsed(text: str) -> Formula:
    """Return the formula of a text, each parsed once. Raise FormulaInvalid if it is none."""
    return Formula.parse(text)


class Shaped(Protocol):
    """An input with a shape."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def shape(self) -> Sequence[str | int]:
        """Axis symbols and sizes, without the batch axis."""


def broken_relations(
    formulas: Mapping[str, Formula], inputs: Iterable[Shaped], sent: Container[str], lengths: dict[str, int]
) -> list[str]:
    """Describe the axes of one sequence that do not follow from others; add the lengths of those that were not sent.

    Args:
        formulas: by axis symbol.
        inputs: of the model.
        sent: names of the inputs that the sequence has.
        lengths: of the axes that these have.
    """
    broken: list[str] = []
    for symbol, formula in formulas.items():
        known = {part: lengths[part] for part in formula.symbols if part in lengths}
        if len(known) < len(formula.symbols):
            lengths.setdefault(symbol, 0)  # an input with the missing part is missing too, and is reported
            continue
        length = formula.length_at(known)
        if lengths.setdefault(symbol, length) != length:
            along = [each for each in inputs if symbol in each.shape]
            first = next((each for each in along if each.name in sent), along[0])
            relation = symbol if symbol == str(formula) else f"{symbol} = {formula}"
            has = f"axis {list(first.shape).index(symbol)} of input {first.name!r} has {lengths[symbol]} positions"
            broken.append(f"{has}; by the relation {relation} it must have {formula.shown(known)} = {length}")
    return broken


def _sum(tokens: list[str], text: str) -> tuple[Formula, list[str]]:
    return _chain(tokens, {"+", "-"}, lambda rest: _chain(rest, {"*", "/", "//"}, lambda left: _leaf(left, text)))


def _chain(
    tokens: list[str], signs: set[str], part: Callable[[list[str]], tuple[Formula, list[str]]]
) -> tuple[Formula, list[str]]:
    """Read parts that operators of one rank join, from the left."""
    formula, rest = part(tokens)
    while rest and rest[0] in signs:
        other, left = part(rest[1:])
        formula, rest = Formula(None, rest[0], (formula, other)), left
    return formula, rest


def _leaf(tokens: list[str], text: str) -> tuple[Formula, list[str]]:
    if not tokens:
        raise FormulaInvalid(f"{text!r} is no formula: it ends too early")
    if tokens[0] == "(":
        formula, rest = _sum(tokens[1:], text)
        if rest[:1] != [")"]:
            raise FormulaInvalid(f"{text!r} is no formula: a parenthesis is not closed")
        return formula, rest[1:]
    if tokens[0] in {")", *_RANK}:
        raise FormulaInvalid(f"{text!r} is no formula: {tokens[0]!r} is not expected")
    return Formula(int(tokens[0]) if tokens[0].isdecimal() else tokens[0]), tokens[1:]
