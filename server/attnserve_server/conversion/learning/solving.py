"""Solves for the axes of a graph's inputs that nodes force to belong together, and proves each solution by running it.

A file may leave open what its graph forces: the channels of an image, its height and width where a table of positions
has one length, axes that must be equal, an axis that is the sum of two others. Proposals come from the graph's nodes
(`relations`) first, and then, for axes without names, from trying which of them are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import Final

import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.reading import save
from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.conversion.learning.relations import Equation, common_size, equations_of, isolated
from attnserve_server.conversion.probing.feeds import Sampler, probe_lengths
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.proof.sizes import Size
from attnserve_server.model.formula import Formula

_MOST_ROUNDS: Final = 12
"""How many times equations are collected: each solution shows nodes behind the one that it satisfies."""
_MOST_TRIES, _MOST_SYMBOLS = 64, 6
_MOST_CHARACTERS: Final = 160
"""The longest relation that a refusal has."""


@dataclass(frozen=True, slots=True)
class Solved:
    """What is known of the axes of a graph's inputs.

    Attributes:
        signature: with sizes, shared symbols and formulas in the place of symbols that were solved for.
        sizes: the solved sizes, by symbol.
        facts: each solution in words, with its reason.
        left: the equations that no solution satisfies; empty where the graph runs.
        runs: whether the graph runs on the solution.
    """

    signature: Signature
    sizes: Mapping[str, int] = field(default_factory=dict)
    facts: tuple[str, ...] = ()
    left: tuple[Equation, ...] = ()
    runs: bool = True

    @property
    def open_axes(self) -> str:
        """Which axes a refusal names, with the relation that fails and the options that fix them; empty if it runs."""
        related = {symbol for each in self.left for symbol in each.symbols}
        symbols = [symbol for symbol in self.signature.symbols if symbol in related]
        floats = {size for spec in self.signature.inputs if spec.dtype.startswith("float") for size in spec.shape}
        symbols = symbols or [symbol for symbol in self.signature.symbols if symbol in floats]
        if self.runs or not symbols:
            return ""
        first = self.signature.where(symbols[0])
        where = f" of input {first[0].name!r}" if first is not None else ""
        relation = f"needs {self.left[0]}" if self.left else ""
        if not 0 < len(relation) <= _MOST_CHARACTERS:
            relation = "may run at some sizes only" + (f", because of {self.left[0].where}" if self.left else "")
        options = " ".join(f"--axis {_quoted(symbol)}=SIZE" for symbol in symbols)
        return f"the graph {relation}, for axes {', '.join(map(repr, symbols))}{where}: fix them with {options}"


def _quoted(symbol: str) -> str:
    return symbol if symbol.isidentifier() else f"'{symbol}'"


def solved_axes(proto: onnx.ModelProto, signature: Signature, work: Path) -> Solved:
    """Solve for axes until the graph runs, if it does not run on axes that are free.

    Args:
        proto: the graph.
        signature: of the graph.
        work: a folder for a file.

    Returns:
        The solution with the fewest axes solved for. Where the graph runs on none, what its nodes force is kept, but no
        guess.

    Raises:
        BuildRefused: the runtime cannot load the graph.
    """
    floats = {size for spec in signature.inputs if spec.dtype.startswith("float") for size in spec.shape}
    if len(signature.symbols) < 2 and not {*signature.symbols} & floats:
        return Solved(signature)
    path = work / "open.onnx"
    save(ir.from_proto(proto), path)
    runner = GraphRunner(path)
    named = {axis.dim_param for value in proto.graph.input for axis in value.type.tensor_type.shape.dim}
    known, sizes, facts = signature, dict[str, int](), list[str]()
    left: list[Equation] = []
    for _ in range(_MOST_ROUNDS):
        if _runs(runner, known):
            if all(known.where(symbol) is not None for symbol in known.symbols):
                return Solved(known, sizes, tuple(facts))
            # A length must be a multiple of a number, and no input has the quotient.
            return Solved(signature, runs=False)
        left = equations_of(proto, known)
        step = _step(left, known, named)
        if step is None:
            break
        found, fact = step
        known = known.solved(found)
        sizes |= {symbol: each for symbol, each in found.items() if isinstance(each, int)}
        facts.append(fact)
    nameless = [symbol for symbol in known.symbols if symbol not in named]
    if nameless and 2 <= len(known.symbols) <= _MOST_SYMBOLS:
        for way in islice(_equalities(known.symbols, nameless), _MOST_TRIES):
            candidate = known.solved({symbol: Formula(other) for symbol, other in way.items()})
            if _runs(runner, candidate):
                equal = (
                    f"axes {symbol!r} and {other!r} are equal: it runs so, and not otherwise"
                    for symbol, other in way.items()
                )
                return Solved(candidate, sizes, (*facts, *equal))
    return Solved(known, sizes, tuple(facts), tuple(left), runs=False)


def _step(
    equations: Sequence[Equation], signature: Signature, named: set[str]
) -> tuple[dict[str, int | Formula], str] | None:
    """Return what the first equation that can be solved gives, and the fact in words: sizes first, formulas last."""
    ways = (_fixed, _equal, _followed, _square)
    found = (way(equation, signature, named) for way in ways for equation in equations)
    return next((step for step in found if step is not None), None)


def _fixed(equation: Equation, signature: Signature, named: set[str]) -> tuple[dict[str, int | Formula], str] | None:
    del named
    for symbol in signature.symbols:
        size = isolated(equation, symbol)
        number = None if size is None else size.number
        if number is not None and number > 0:
            return {symbol: number}, f"axis {symbol!r} is {number}, because of {equation.where}"
    return None


def _equal(equation: Equation, signature: Signature, named: set[str]) -> tuple[dict[str, int | Formula], str] | None:
    """Give one of two axes the symbol of the other: a nameless axis that of a named one, else the later the first."""
    pair = [symbol for symbol in signature.symbols if isolated(equation, symbol) is not None]
    if len(pair) != 2 or len(equation.symbols) != 2 or equation.one.terms == () or equation.other.terms == ():
        return None
    if isolated(equation, pair[1]) != Size.atom({**equation.one.atoms, **equation.other.atoms}[pair[0]]):
        return None
    kept, gone = pair if pair[0] in named or pair[1] not in named else pair[::-1]
    return {gone: Formula(kept)}, f"axes {gone!r} and {kept!r} are equal, because of {equation.where}"


def _followed(equation: Equation, signature: Signature, named: set[str]) -> tuple[dict[str, int | Formula], str] | None:
    """Let an axis follow from others: the last one for which the equation gives sums and products alone."""
    last_first = [*reversed(signature.symbols)]
    for symbol in sorted(last_first, key=lambda symbol: symbol in named):
        size = isolated(equation, symbol)
        formula = None if size is None else _formula(size)
        if formula is not None and formula.symbols:
            return {symbol: formula}, f"axis {symbol!r} is {formula}, because of {equation.where}"
    return None


def _formula(size: Size) -> Formula | None:
    """Return a polynomial of symbols without a negative term as a formula."""
    if any(factor < 0 or any(name not in size.symbols for name in monomial) for monomial, factor in size.terms):
        return None
    terms = [
        _joined("*", [*([Formula(factor)] if factor != 1 or not monomial else []), *map(Formula, monomial)])
        for monomial, factor in sorted(size.terms, key=lambda term: not term[0])
    ]
    formula = _joined("+", terms) if terms else None
    # A name that is a formula itself, or has other characters, cannot be a part of one.
    return formula if formula is not None and all(symbol.isidentifier() for symbol in formula.symbols) else None


def _joined(operator: str, parts: Sequence[Formula]) -> Formula:
    whole = parts[0]
    for part in parts[1:]:
        whole = Formula(None, operator, (whole, part))
    return whole


def _square(equation: Equation, signature: Signature, named: set[str]) -> tuple[dict[str, int | Formula], str] | None:
    """Give all axes of one equation the one size that solves it, where one input has them all."""
    del named
    symbols = [symbol for symbol in signature.symbols if symbol in equation.symbols]
    if len(symbols) > 2 or not any(all(symbol in spec.shape for symbol in symbols) for spec in signature.inputs):
        return None
    size = common_size(equation)
    if size is None:
        return None
    square = ", if they are equal" if len(symbols) > 1 else ""
    axes = " and ".join(map(repr, symbols))
    fact = f"ax{'e' if len(symbols) > 1 else 'i'}s {axes} {'are' if len(symbols) > 1 else 'is'} {size}{square}"
    return dict.fromkeys(symbols, size), f"{fact}, because of {equation.where}"


def _equalities(symbols: Sequence[str], nameless: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield which nameless axes take an earlier axis's symbol, the fewest such first."""
    before = {symbol: symbols[: symbols.index(symbol)] for symbol in nameless}
    ways = [
        dict(zip(nameless, way, strict=True)) for way in product(*((symbol, *before[symbol]) for symbol in nameless))
    ]
    for way in sorted(ways, key=lambda way: sum(symbol != name for symbol, name in way.items())):
        moved = {symbol: name for symbol, name in way.items() if symbol != name}
        if moved and not any(name in moved for name in moved.values()):
            yield moved


def _runs(runner: GraphRunner, signature: Signature) -> bool:
    sampler = Sampler(signature)
    try:
        for lengths in probe_lengths(signature.symbols):
            runner.run(sampler.rows(lengths, 1), runner.output_names)
    except BuildRefused:
        return False
    return True
