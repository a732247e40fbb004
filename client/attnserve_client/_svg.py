"""SVG text of a drawing: its parts, its colours, its words. The views of attention maps are in `_svg_views`.

A drawing has no script and no style sheet, and loads nothing. Token texts are escaped, so that they stay text.
"""

from __future__ import annotations

import hashlib
import html
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

RAMP: Final = ((251, 248, 242), (248, 220, 188), (240, 162, 114), (212, 85, 93), (138, 28, 98), (59, 15, 70))
"""The colours of weights from 0 to the greatest, as on the page, on a light background."""
NEGATIVE: Final = (11, 79, 138)
"""Colour of the least weight, where a linear site has weights below 0."""
PAPER, INK, SOFT, LINE, OUTSIDE = "#ffffff", "#1d1f24", "#5d626d", "#d5d1c8", "#d9dce1"
GAMMA: Final = 0.6
"""Exponent of the colour scale; below 1, so that weak weights differ visibly from 0."""
FONT: Final = 'system-ui, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif'
PAD: Final = 10
LINE_HEIGHT: Final = 18
LONGEST_LABEL: Final = 24
_EM: Final = 0.62
_EM_UPPER: Final = 0.72
_WIDEST: Final = frozenset("MWmw@%…")
"""Letters of about one em. The widths of fonts are not known here, so that margins are estimates for wide fonts."""
_NOT_SHOWN: Final = ("Cc", "Cs", "Zl", "Zp")
_DIRECTIONS: Final = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of the text after them."""

Rgb = tuple[int, int, int]


class Svg(str):
    """The text of an SVG file. A notebook draws it where it is the last value of a cell."""

    __slots__ = ()

    def __repr__(self) -> str:
        """Return the size alone: notebooks store it beside the drawing."""
        return f"<SVG of {len(self)} characters>"

    def _repr_svg_(self) -> str:
        return str(self)


@dataclass(slots=True)
class Drawing:
    """The parts of a drawing, in the order in which they are painted.

    Attributes:
        title: What it is, in a few words; the first that a screen reader reads.
        parts: Elements.
        notes: Lines of text below the drawing.
    """

    title: str
    parts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        anchor: Literal["start", "middle", "end"] = "start",
        size: float = 12,
        fill: str = INK,
        rotate: float = 0,
    ) -> None:
        """Add text whose baseline starts, ends or has its middle at a point."""
        if rotate:
            place = f'transform="translate({number(x)} {number(y)}) rotate({number(rotate)})"'
        else:
            place = f'x="{number(x)}" y="{number(y)}"'
        anchored = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.parts.append(f'<text {place}{anchored} font-size="{number(size)}" fill="{fill}">{escaped(words)}</text>')

    def finish(self, width: float, height: float, caption: str, description: str) -> Svg:
        """Return the file: caption above, notes below, with title and description for a screen reader.

        Args:
            width: Of the parts, in pixels.
            height: Of the parts.
            caption: A line above them; an empty one adds none.
            description: What the drawing shows, in sentences.
        """
        above = LINE_HEIGHT + PAD if caption else 0
        total = 2 * PAD + max(width, *(width_of(line) for line in (caption, *self.notes)))
        below = LINE_HEIGHT * len(self.notes)
        heading, footer = Drawing(""), Drawing("")
        if caption:
            heading.text(PAD, PAD + 12, caption, size=13)
        for line, note in enumerate(self.notes):
            footer.text(PAD, PAD + above + height + LINE_HEIGHT * (line + 1) - 4, note, fill=SOFT)
        tall = 2 * PAD + above + height + below
        body = [
            f'<rect width="{number(total)}" height="{number(tall)}" fill="{PAPER}"/>',
            *heading.parts,
            f'<g transform="translate({PAD} {number(PAD + above)})">',
            *self.parts,
            "</g>",
            *footer.parts,
            "</svg>\n",
        ]
        title, description = escaped(self.title), escaped(description)
        # Several drawings may be in one page, so that ids are not the same for all.
        name = "a" + hashlib.sha256("\n".join((title, description, *body)).encode()).hexdigest()[:12]
        size = f'width="{number(total)}" height="{number(tall)}" viewBox="0 0 {number(total)} {number(tall)}"'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="{name}t {name}d" '
            f"font-family='{FONT}'>"
        )
        return Svg("\n".join((head, f'<title id="{name}t">{title}</title>', _described(name, description), *body)))


def _described(name: str, description: str) -> str:
    return f'<desc id="{name}d">{description}</desc>'


def titled(element: str, attributes: str, title: str) -> str:
    """Return an element with a text that a browser shows where the pointer is on it."""
    return f"<{element} {attributes}><title>{escaped(title)}</title></{element}>"


def number(value: float) -> str:
    """Return a coordinate with at most two decimals."""
    return f"{round(value, 2):g}" if abs(value) < 100_000 else str(round(value))


def plain(text: str, longest: int = 0) -> str:
    """Return text for a label, with spaces in place of control characters and marks of direction.

    Args:
        text: Any text.
        longest: Most letters; 0 for no limit.
    """
    letters = [
        " "
        if unicodedata.category(letter) in _NOT_SHOWN or letter in _DIRECTIONS
        else "\ufffd"
        if letter in "\ufffe\uffff"  # XML 1.0 has neither of them
        else letter
        for letter in text
    ]
    cut = letters if not longest or len(letters) <= longest else [*letters[: longest - 1], "…"]
    return "".join(cut)


def escaped(text: str) -> str:
    """Return text for an element or an attribute of XML."""
    return html.escape(plain(text), quote=True)


def width_of(text: str, size: float = 12) -> float:
    """Return the width of a text in pixels, as an estimate: letters of Chinese, Japanese and Korean are wide."""
    ems = 0.0
    for letter in plain(text):
        if letter in _WIDEST or unicodedata.east_asian_width(letter) in "WF":
            ems += 1.0
        elif not unicodedata.combining(letter):
            ems += _EM_UPPER if letter.isupper() else _EM
    return ems * size


def widest(texts: Sequence[str], size: float = 12) -> float:
    """Return the width of the widest text in pixels; 0 for none."""
    return max((width_of(text, size) for text in texts), default=0.0)


def colour(share: float) -> Rgb:
    """Return the colour of a weight as a share of the greatest one, from 0 to 1, or from -1 for weights below 0."""
    if share < 0:
        return _between(RAMP[0], NEGATIVE, min(1.0, -share) ** GAMMA)
    place = min(1.0, share) ** GAMMA * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    return _between(RAMP[low], RAMP[low + 1], place - low)


def _between(low: Rgb, high: Rgb, share: float) -> Rgb:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return red, green, blue


def css(rgb: Rgb) -> str:
    """Return a colour as SVG writes it."""
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def ink_on(rgb: Rgb) -> str:
    """Return black or white, whichever has the greater contrast. Source: WCAG 2.2, relative luminance."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (c / 255 for c in rgb)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"
