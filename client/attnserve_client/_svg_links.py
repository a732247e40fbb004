"""The links of an attention map as SVG: lines between two columns of words, and arcs beside one column.

Which links are drawn follows the rule of `AttentionMap.links()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from attnserve_client._map_data import MapData
from attnserve_client._svg import (
    GAMMA,
    INK,
    LINE,
    LONGEST_LABEL,
    SOFT,
    Drawing,
    colour,
    css,
    number,
    plain,
    titled,
    widest,
    width_of,
)
from attnserve_client._tokens import Link, Token

Made = tuple[Drawing, float, float, str]
"""A drawing, its width and height in pixels, and what it is, in a sentence."""

_LINKS: Final = (10, 60)
"""Fewest and most links that are drawn unless `top` is given; between them, two for each query."""
_MOST_ROWS: Final = 100
"""Words of a column; of more, only those with a link are drawn."""
_GAP: Final = 260
"""Pixels between the two columns."""
_SIZE: Final = 13.0
"""Pixels of the words."""
_ARC: Final = (14, 220)
"""Pixels between an arc and its words: least, and that of the longest arc."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Which links are drawn, as in `AttentionMap.links()`.

    Attributes:
        top: Most links; None for two for each query, from 10 to 60 together.
        include_self: Links from a unit to itself.
        exclude_special: No links from and to special tokens.
        exclude_punctuation: No links from and to units without a letter or digit.
    """

    top: int | None = None
    include_self: bool = False
    exclude_special: bool = True
    exclude_punctuation: bool = True

    def links(self, attention: MapData, most: int | None = None) -> list[Link]:
        """Return the links of a map of one head, strongest first."""
        automatic = max(_LINKS[0], min(_LINKS[1], 2 * len(attention.query_tokens)))
        chosen = automatic if self.top is None else self.top
        return attention.links(
            top=chosen if most is None else most,
            include_self=self.include_self,
            exclude_special=self.exclude_special,
            exclude_punctuation=self.exclude_punctuation,
        )

    def note(self, attention: MapData) -> str:
        """Return a sentence on what is left out of the links of a map; an empty one for nothing."""
        same = attention.query_axis == attention.key_axis
        parts = [
            "links of a unit to itself" * (same and not self.include_self),
            "special tokens" * self.exclude_special,
            "punctuation" * self.exclude_punctuation,
        ]
        named = [part for part in parts if part]
        if len(named) > 1:
            named[-2:] = [f"{named[-2]} and {named[-1]}"]
        return f"Without {', '.join(named)}." if named else ""


def bipartite(attention: MapData, one: MapData, rule: Rule, title: str) -> Made:
    """Draw lines from a column of queries to a column of keys.

    Args:
        attention: The map.
        one: The same, of one head.
        rule: Which links are drawn.
        title: For screen readers.
    """
    found = rule.links(one)
    drawing = Drawing(title)
    sides = [
        _Column.of(tokens, {end.index for end in ends})
        for tokens, ends in (
            (one.query_tokens, [link.query_token for link in found]),
            (one.key_tokens, [link.key_token for link in found]),
        )
    ]
    axes = [f" ({axis})" if attention.query_axis != attention.key_axis else "" for axis in _axes(attention)]
    heads = (f"looks …{axes[0]}", f"… at{axes[1]}")
    left = max(widest(sides[0].labels, _SIZE), width_of(heads[0])) + 4
    right = left + _GAP
    drawing.text(left, 12, heads[0], anchor="end", fill=SOFT)
    drawing.text(right, 12, heads[1], fill=SOFT)
    sides[0].draw(drawing, left, "end")
    sides[1].draw(drawing, right, "start")
    names, greatest = attention.names(), max((link.weight for link in found), default=1.0)
    for link in reversed(found):
        start, end = sides[0].places[link.query_token.index], sides[1].places[link.key_token.index]
        x0, x1, middle = left + 6, right - 6, (left + right) / 2
        curve = f"M{number(x0)} {number(start)}C{number(middle)} {number(start)} {number(middle)} {number(end)} "
        _line(drawing, f"{curve}{number(x1)} {number(end)}", link, names, greatest)
    drawing.notes += [note for note in (_counted(found, greatest), rule.note(attention)) if note]
    width = right + max(widest(sides[1].labels, _SIZE), width_of(heads[1]))
    what = f"Two columns of words; a line leads from a word on the left to a word that it looks at. {len(found)} lines."
    return drawing, width, max(side.height for side in sides), what


def arcs(attention: MapData, one: MapData, rule: Rule, title: str) -> Made:
    """Draw arcs beside one column of words.

    Args:
        attention: The map.
        one: The same, of one head.
        rule: Which links are drawn.
        title: For screen readers.

    Raises:
        ValueError: The queries and the keys are of two axes.
    """
    if attention.query_axis != attention.key_axis:
        sides = f"{attention.query_axis} and {attention.key_axis}"
        raise ValueError(f"arcs are of one sequence, and this map has two sides ({sides}); draw it as bipartite")
    found = rule.links(one)
    drawing = Drawing(title)
    # Either side may be a part of the units.
    units = {token.index: token for token in (*one.key_tokens, *one.query_tokens)}
    ends = {token.index for link in found for token in (link.query_token, link.key_token)}
    column = _Column.of([units[index] for index in sorted(units)], ends)
    distances = [abs(column.places[link.query_token.index] - column.places[link.key_token.index]) for link in found]
    farthest = max(distances, default=0.0) or 1.0
    half = widest(column.labels, _SIZE) / 2 + 8
    reach = _ARC[0] + (_ARC[1] - _ARC[0]) * min(1.0, farthest / 400)
    centre = max(reach, width_of("looks ahead")) + half + 4
    drawing.text(centre - half, 12, "looks back", anchor="end", fill=SOFT)
    drawing.text(centre + half, 12, "looks ahead", fill=SOFT)
    column.draw(drawing, centre, "middle")
    names, greatest = attention.names(), max((link.weight for link in found), default=1.0)
    for link, distance in zip(reversed(found), reversed(distances), strict=True):
        start, end = column.places[link.query_token.index], column.places[link.key_token.index]
        side = 1 if end >= start else -1
        x = centre + side * half
        bulge = _ARC[0] + (reach - _ARC[0]) * (distance / farthest) ** 0.7
        if start == end:
            start, end, bulge = start - 5, end + 5, _ARC[0]
        out = number(x + side * bulge * 4 / 3)  # a cubic curve reaches three quarters of the way to its handles
        curve = f"M{number(x)} {number(start)}C{out} {number(start)} {out} {number(end)} {number(x)} {number(end)}"
        _line(drawing, curve, link, names, greatest)
        drawing.parts.append(f'<circle cx="{number(x)}" cy="{number(end)}" r="3" fill="{_stroke(link, greatest)}"/>')
    drawing.notes.append("A dot is at the word that is looked at.")
    drawing.notes += [note for note in (_counted(found, greatest), rule.note(attention)) if note]
    what = "A column of words with arcs, to the right where a word looks ahead, to the left where it looks back."
    return drawing, 2 * centre, column.height, f"{what} {len(found)} arcs."


def _axes(attention: MapData) -> tuple[str, str]:
    return attention.query_axis, attention.key_axis


def _stroke(link: Link, greatest: float) -> str:
    # From the middle of the colours on: paler lines would have too little contrast with paper.
    return css(colour((0.45 + 0.55 * link.weight / greatest) ** (1 / GAMMA)))


def _line(drawing: Drawing, curve: str, link: Link, names: dict[Token, str], greatest: float) -> None:
    wide = number(0.75 + 4.25 * link.weight / greatest)
    words = f"{names[link.query_token]} looks at {names[link.key_token]}: {link.weight:.4f}"
    look = f'd="{curve}" fill="none" stroke="{_stroke(link, greatest)}" stroke-width="{wide}" stroke-opacity="0.85"'
    drawing.parts.append(titled("path", look, words))


def _counted(found: Sequence[Link], greatest: float) -> str:
    if not found:
        return "No links."
    return f"The {len(found)} strongest links, from {found[-1].weight:.3f} to {greatest:.3f}, the wider the stronger."


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of words from top to bottom. None represents words that are left out.

    Attributes:
        words: The words, in the order of their indices.
        labels: Their texts.
        places: Height of each by its index.
        height: Height of the column.
        line: Height of a word.
    """

    words: list[Token | None]
    labels: list[str]
    places: dict[int, float]
    height: float
    line: float

    @classmethod
    def of(cls, tokens: Sequence[Token], ends: set[int]) -> _Column:
        """Place the words of a side; of many, only those where a link ends."""
        words: list[Token | None] = []
        for token in tokens:
            if len(tokens) <= _MOST_ROWS or token.index in ends:
                words.append(token)
            elif words and words[-1] is not None:
                words.append(None)
        line = 22.0 if len(words) <= 40 else 17.0
        places: dict[int, float] = {}
        at, before = 30.0, None
        for word in words:
            if before is not None and word is not None and word.segment != before.segment and not word.special:
                at += line / 2  # a second text
            if word is not None:
                places[word.index] = at
                before = before if word.special else word
            at += line
        labels = ["⋮" if word is None else plain(word.text, LONGEST_LABEL) for word in words]
        return cls(words, labels, places, at, line)

    def draw(self, drawing: Drawing, x: float, anchor: Literal["start", "middle", "end"]) -> None:
        """Add the words at `x`, each at its height."""
        at = 30.0
        for word, label in zip(self.words, self.labels, strict=True):
            at = self.places[word.index] if word is not None else at + self.line
            fill = LINE if word is None else SOFT if word.special else INK
            drawing.text(x, at + 0.35 * _SIZE, label, anchor=anchor, size=_SIZE, fill=fill)
