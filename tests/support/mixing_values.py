"""The values of generated graphs, whose dependence on padding and on other rows is known.

A piece of a graph takes and returns a `Stream`. A poison is a piece that lets padding or other rows change a sequence's
own part of the value: that part is then tainted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from mixing_writer import Writer

Array = np.ndarray[Any, np.dtype[Any]]

UNSAID = "unsaid"
"""The poison of a value where the grammar does not know whether it is mixed. Nothing is claimed of it."""
NAN_BEHIND = "NaN behind the sequence"
LONGEST = 512
"""Rows of position tables, and so the greatest length of every axis."""
LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True, slots=True)
class Need:
    """What must hold of a mask input for an answer to be independent of padding.

    `need` "some": one position or more is allowed; "all": every one is. `ones`: allowed positions hold 1.
    """

    input: str
    need: Literal["some", "all"]
    ones: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """What is known of a value by construction.

    Args:
        taint: By axis (`batch` or a symbol): the poison that lets others into a sequence's own part of the value.
        behind: The content of padded positions: zeros, finite numbers, or NaN.
        norm: A bound on the Euclidean norm of the last axis, at every position. None: no bound.
    """

    taint: Mapping[str, str] = field(default_factory=dict)
    behind: Literal["zero", "finite", "nan"] = "finite"
    norm: float | None = None
    needs: frozenset[Need] = frozenset()
    raw: bool = False
    """True for a float input as it is sent, of any size."""

    def tainted(self, axis: str, poison: str) -> State:
        """Return the state after a poison lets `axis` in.

        The first poison keeps its name, and replaces an unsaid one.
        """
        known = self.taint.get(axis, UNSAID)
        return replace(self, taint={**self.taint, axis: poison if known == UNSAID else known}, norm=None, raw=False)

    def joined(self, *others: State) -> State:
        """Return the state of a value computed from several, position by position. Its norm is not known."""
        state = self
        for other in others:
            for axis, poison in other.taint.items():
                state = state.tainted(axis, poison)
        behind = {each.behind for each in (self, *others)}
        return replace(
            state,
            behind="nan" if "nan" in behind else "finite",
            norm=None,
            raw=False,
            needs=state.needs.union(*(other.needs for other in others)),
        )

    def needing(self, *needs: Need) -> State:
        """Return the state with further needs."""
        return replace(self, needs=self.needs | set(needs))

    def finite(self, norm: float | None = None) -> State:
        """Return the state after an operation by position that changes zeros. NaN stays NaN."""
        return replace(self, behind="nan" if self.behind == "nan" else "finite", norm=norm, raw=False)


@dataclass(frozen=True, slots=True)
class Stream:
    """A value float32 (B, symbol, width), the type that pieces take and return."""

    name: str
    symbol: str
    width: int
    state: State


@dataclass(frozen=True, slots=True)
class MaskInput:
    """The mask of one symbol.

    Args:
        keep: A boolean value (B, symbol), true where a position is allowed.
        ones: float32 (B, symbol), 1 where allowed, 0 elsewhere if the input holds valid values.
        arithmetic: True if `ones` is computed from the input's own number, so that a number other than 1 changes it.
        picky: True if `keep` is false for some numbers other than the padding.
    """

    input: str
    keep: str
    ones: str
    arithmetic: bool = False
    picky: bool = False

    def need(self, how: Literal["some", "all"], *, by_ones: bool = False) -> Need:
        """Return a need of this input. `by_ones`: `ones` is used, not `keep`."""
        return Need(self.input, how, ones=self.arithmetic if by_ones else self.picky)


@dataclass
class Context:
    """One graph in construction: its writer, the values of its inputs, and the names of the pieces so far."""

    writer: Writer
    masks: dict[str, MaskInput] = field(default_factory=dict)
    wrong_masks: dict[str, MaskInput] = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)
    weights: dict[str, State] = field(default_factory=dict)
    """The state of each attention's weights, by the prefix of its node names."""
    safe: bool = True
    """True if pieces must leave nothing mixed. Otherwise one of them may be a poison."""

    def attends(self, state: State, *operands: Stream) -> None:
        """Record the state of the weights of the attention that is written, from its output's dependencies.

        It is not known whether the operands' own dependencies show in the weights: a softmax removes some.
        """
        brought = {axis for operand in operands for axis in operand.state.taint}
        brought |= {operand.symbol for operand in operands if operand.state.behind == "nan"}
        taint = {axis: UNSAID if axis in brought else poison for axis, poison in state.taint.items()}
        self.weights[self.writer.prefix] = replace(state, taint=taint)

    def begin(self, piece: str) -> None:
        """Name the piece whose nodes follow."""
        self.pieces.append(piece)
        self.writer.prefix = f"p{len(self.pieces)}.{piece.replace(' ', '_')}"


def over(
    state: State, symbol: str, poison: str, *, hidden: Literal["where", "product", "zero", "causal", ""] = ""
) -> State:
    """Return the state of a value that reads all positions of `symbol`.

    Args:
        state: The state of the value that is read.
        symbol: The symbol along which it is read.
        poison: The name of the fault where padded positions are read.
        hidden: How padded positions are hidden: replaced ("where"), multiplied by 0 ("product"), 0 already ("zero"),
            or never read ("causal"). Empty: not at all.
    """
    if not hidden:
        return replace(state.tainted(symbol, poison), behind="finite")
    if hidden in {"product", "zero"} and state.behind == "nan":
        return replace(state.tainted(symbol, NAN_BEHIND), behind="finite")
    return state.finite()


def tainted(stream: Stream, name: str, *faults: tuple[str, str]) -> Stream:
    """Return the stream under another value, with (axis, poison) faults."""
    state = stream.state.finite()
    for axis, poison in faults:
        state = state.tainted(axis, poison)
    return replace(stream, name=name, state=state)
