"""Sizes of axes as polynomials of symbols, so that one interpretation holds for all lengths. Knows no tensors.

An operation that has no exact result returns None, or an atom that stays opaque. Nothing here raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

Monomial = tuple[str, ...]
"""A product of atom names, sorted, each as often as its power."""


@dataclass(frozen=True, slots=True)
class Atom:
    """An indivisible part of a polynomial: a symbol, or a function of polynomials such as a floor.

    Args:
        name: Its text. Equal names are equal atoms.
        symbols: The symbols that it depends on.
        least: Its lower bound, for every length that is served.
        most: Its upper bound.
        dividend: The dividend, where the atom is a quotient rounded down.
        divisor: The divisor of that quotient.
    """

    name: str
    symbols: frozenset[str]
    least: int
    most: float
    dividend: Size | None = field(default=None, compare=False)
    divisor: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Size:
    """An integer that depends on symbols: a polynomial of atoms. Equal polynomials are equal objects."""

    terms: tuple[tuple[Monomial, int], ...]
    atoms: Mapping[str, Atom] = field(compare=False, hash=False, default_factory=dict)

    @classmethod
    def of(cls, value: int) -> Size:
        """Return the size that is a number."""
        return cls(((((), value),)) if value else ())

    @classmethod
    def atom(cls, atom: Atom) -> Size:
        """Return the size that is one atom."""
        return cls((((atom.name,), 1),), {atom.name: atom})

    @property
    def number(self) -> int | None:
        """The number, where the size is constant. Otherwise None."""
        if not self.terms:
            return 0
        return self.terms[0][1] if len(self.terms) == 1 and not self.terms[0][0] else None

    @cached_property
    def symbols(self) -> frozenset[str]:
        """The symbols that it depends on."""
        names = {name for monomial, _ in self.terms for name in monomial}
        return frozenset(symbol for name in names for symbol in self.atoms[name].symbols)

    def __add__(self, other: Size) -> Size:
        terms = dict(self.terms)
        for monomial, factor in other.terms:
            terms[monomial] = terms.get(monomial, 0) + factor
        return _size(terms, (self, other))

    def __neg__(self) -> Size:
        return Size(tuple((monomial, -factor) for monomial, factor in self.terms), self.atoms)

    def __sub__(self, other: Size) -> Size:
        return self + -other

    def __mul__(self, other: Size) -> Size:
        terms: dict[Monomial, int] = {}
        for one, factor in self.terms:
            for two, by in other.terms:
                monomial = tuple(sorted((*one, *two)))
                terms[monomial] = terms.get(monomial, 0) + factor * by
        return _size(terms, (self, other))

    def over(self, other: Size) -> Size | None:
        """Return the quotient where it is a polynomial with integer factors, else None."""
        if not other.terms:
            return None
        rest, quotient = self, Size(())
        lead, by = _leading(other)
        while rest.terms:
            monomial, factor = _leading(rest)
            left = _without(monomial, lead)
            if left is None or factor % by:
                return None
            step = Size(((left, factor // by),), {name: rest.atoms[name] for name in left})
            quotient += step
            rest -= step * other
        return quotient

    def bounds(self) -> tuple[float, float]:
        """Return a lower and an upper bound, as far as the bounds of its atoms allow."""
        low, high = self.bounds_of_atoms()
        if not any(atom.divisor for atom in self.atoms.values()):
            return low, high
        return max(low, self._rounded(down=True).bounds_of_atoms()[0]), min(
            high, self._rounded(down=False).bounds_of_atoms()[1]
        )

    def _rounded(self, *, down: bool) -> Size:
        """Return a size that is no greater (`down`) or no less: k * floor(x / k) is between x - (k - 1) and x."""
        result = Size(())
        for monomial, factor in self.terms:
            atom = self.atoms[monomial[0]] if len(monomial) == 1 else None
            if atom is None or not atom.divisor or factor % atom.divisor or atom.dividend is None:
                result += Size(((monomial, factor),), {name: self.atoms[name] for name in monomial})
                continue
            short = Size.of(atom.divisor - 1 if (factor > 0) is down else 0)
            result += (atom.dividend - short) * Size.of(factor // atom.divisor)
        return result

    def bounds_of_atoms(self) -> tuple[float, float]:
        """Return bounds that treat each atom as independent."""
        least = most = 0.0
        for monomial, factor in self.terms:
            low = high = float(factor)
            for name in monomial:
                atom = self.atoms[name]
                corners = [_times(end, by) for end in (low, high) for by in (atom.least, atom.most)]
                low, high = min(corners), max(corners)
            least, most = least + low, most + high
        return least, most

    def __str__(self) -> str:
        """Return the polynomial in the usual notation."""
        parts = []
        for monomial, factor in self.terms:
            names = " * ".join(monomial)
            parts.append(str(factor) if not names else names if factor == 1 else f"{factor} * {names}")
        return " + ".join(parts) or "0"


ONE = Size.of(1)


def function(name: str, arguments: Iterable[Size], least: float, most: float) -> Size:
    """Return a size that is no polynomial of others, as one atom. Equal names are equal sizes."""
    parts = list(arguments)
    text = f"{name}({', '.join(map(str, parts))})"
    symbols = frozenset(symbol for part in parts for symbol in part.symbols)
    return Size.atom(Atom(text, symbols, int(least), most))


def floor_div(one: Size, by: Size) -> Size:
    """Return the quotient of two positive sizes, rounded down."""
    exact = one.over(by)
    if exact is not None:
        return exact
    number, divisor = one.number, by.number
    if number is not None and divisor:
        return Size.of(number // divisor)
    (low, high), (least, most) = one.bounds(), by.bounds()
    if least < 1 or low < 0:
        return function("floor", (one, by), 0, float("inf"))
    greatest = high // least if high != float("inf") else high
    found = function("floor", (one, by), low // most if most != float("inf") else 0, greatest)
    if divisor is None:
        return found
    (atom,) = found.atoms.values()
    return Size.atom(replace(atom, dividend=one, divisor=divisor))


def modulo(one: Size, by: Size) -> Size | None:
    """Return the remainder of a division by a positive size, or None where it is not known.

    It is written with the multiple that is subtracted, so that sums cancel: the number that fills x up to a multiple of
    k, -x mod k, is k * ceil(x / k) - x.
    """
    if one.bounds()[0] >= 0:
        return one - floor_div(one, by) * by
    if not by.number:
        return None
    filled = Size(tuple((monomial, -factor) for monomial, factor in one.terms if factor % by.number), one.atoms)
    if filled.bounds()[0] < 0 or (one + filled).over(by) is None:
        return None
    return floor_div(filled + by - ONE, by) * by - filled


def lesser(one: Size, other: Size) -> Size:
    """Return the minimum of two sizes."""
    if (other - one).bounds()[0] >= 0:
        return one
    if (one - other).bounds()[0] >= 0:
        return other
    (low, high), (least, most) = one.bounds(), other.bounds()
    if high <= least:
        return one
    if most <= low:
        return other
    first, second = sorted((one, other), key=str)
    return function("min", (first, second), min(low, least), min(high, most))


def greater(one: Size, other: Size) -> Size:
    """Return the maximum of two sizes."""
    if (other - one).bounds()[0] >= 0:
        return other
    if (one - other).bounds()[0] >= 0:
        return one
    (low, high), (least, most) = one.bounds(), other.bounds()
    if low >= most:
        return one
    if least >= high:
        return other
    first, second = sorted((one, other), key=str)
    return function("max", (first, second), max(low, least), max(high, most))


def product(sizes: Iterable[Size]) -> Size:
    """Return the product of all sizes. It is 1 without any."""
    result = ONE
    for size in sizes:
        result *= size
    return result


def _times(one: float, other: float) -> float:
    """Return a product in which 0 times an unbounded size is 0."""
    return 0.0 if not one or not other else one * other


def _size(terms: Mapping[Monomial, int], parents: tuple[Size, Size]) -> Size:
    kept = tuple(sorted((monomial, factor) for monomial, factor in terms.items() if factor))
    known = {**parents[0].atoms, **parents[1].atoms}
    names = {name for monomial, _ in kept for name in monomial}
    return Size(kept, {name: known[name] for name in names})


def _leading(size: Size) -> tuple[Monomial, int]:
    """Return the term of the highest degree, with which division begins."""
    return max(size.terms, key=lambda term: (len(term[0]), term[0]))


def _without(monomial: Monomial, part: Monomial) -> Monomial | None:
    rest = list(monomial)
    for name in part:
        if name not in rest:
            return None
        rest.remove(name)
    return tuple(rest)
