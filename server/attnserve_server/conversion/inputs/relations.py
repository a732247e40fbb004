"""Reads axes of inputs whose names are formulas of other axes, such as `past_sequence_length + sequence_length`.

Each becomes an axis whose length follows from free axes, by sums and products alone, so that every choice of free
lengths is valid. A difference or a quotient is inverted: where `height / 16` is an axis beside `height`, the
quotient is free, and `height` is 16 times as long.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.model.formula import Formula, FormulaInvalid


@dataclass(frozen=True, slots=True)
class Relations:
    """The axes that follow from others.

    Attributes:
        formulas: by symbol; over free symbols, sums and products alone.
        renamed: the names of free axes that had a formula as their name, and may be part of others.
    """

    formulas: Mapping[str, Formula] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


def formula_of(name: str) -> Formula | None:
    """Return the formula that an axis has as its name; None for any other name."""
    try:
        formula = Formula.parse(name)
    except FormulaInvalid:
        return None
    return formula if formula.operator and formula.symbols else None


def relations_of(symbols: Iterable[str], batch_symbols: Collection[str]) -> Relations:
    """Return the axes whose names are formulas of other axes of inputs.

    A name is a formula only where all its symbols are axes of inputs. `encoder_sequence_length / 2` in a file that has
    no axis `encoder_sequence_length` is a name as any other.

    Args:
        symbols: of the axes behind the first, in the order of the inputs.
        batch_symbols: of the first axes.

    Raises:
        BuildRefused: a formula has the batch, or a form that cannot be solved.
    """
    names = list(dict.fromkeys(symbols))
    formulas: dict[str, Formula] = {}
    renamed: dict[str, str] = {}
    for name in names:
        formula = formula_of(name)
        if formula is None or not {*formula.symbols} <= {*names, *batch_symbols}:
            continue
        rows = [each for each in formula.symbols if each in batch_symbols]
        if rows:
            raise BuildRefused(
                f"the axis {name!r} depends on {rows[0]!r}, the batch axis: only the first axis of an input may"
            )
        if formula.grows:
            formulas[name] = formula
            continue
        free = _plain(name, [*names, *renamed.values()])
        solved = _inverted(formula, free)
        if solved is None or solved[0] in formulas:
            raise BuildRefused(
                f"the axis {name!r} cannot be solved for one of its parts: fix one with --axis NAME=SIZE"
            )
        renamed[name] = free
        formulas[solved[0]] = solved[1]
    return Relations(_over_free(formulas), renamed)


def _inverted(formula: Formula, name: str) -> tuple[str, Formula] | None:
    """Solve `name` = a - b, a / n or a // n for the symbol a."""
    first, second = formula.operands
    whole = first.leaf
    if not isinstance(whole, str) or whole in second.symbols or not second.grows:
        return None
    if formula.operator == "-":
        return whole, Formula(None, "+", (Formula(name), second))
    if formula.operator in {"/", "//"}:
        return whole, Formula(None, "*", (second, Formula(name)))
    return None


def _plain(name: str, taken: Collection[str]) -> str:
    """Return a name without operators, such as `height_by_16`."""
    words = {"//": " by ", "/": " by ", "-": " minus ", "+": " plus ", "*": " times ", "(": " ", ")": " "}
    for sign, word in words.items():
        name = name.replace(sign, word)
    plain = "_".join(name.split())
    while plain in taken:
        plain += "_"
    return plain


def _over_free(formulas: Mapping[str, Formula]) -> dict[str, Formula]:
    """Replace symbols that follow from others, until all symbols of all formulas are free."""
    left, found = dict(formulas), dict[str, Formula]()
    while left:
        ready = [name for name, formula in left.items() if not {*formula.symbols} & {*left}]
        if not ready:
            raise BuildRefused(f"the axis {next(iter(left))!r} follows from itself: fix it with --axis NAME=SIZE")
        for name in ready:
            found[name] = left.pop(name).replaced(found)
    return {name: found[name] for name in formulas}
