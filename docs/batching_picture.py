"""Draw the picture of explanation/batching.md: two runs of one sequence, and which influences the proof allows.

python docs/batching_picture.py

Needs matplotlib. A file that cannot be written raises OSError.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

PICTURE = Path(__file__).parent / "images" / "neighbours.png"
LENGTHS = (("A", 3), ("B", 6), ("C", 4))
"""Three sequences of a batch, with their number of positions."""
PADDED = 6
CARD, INK, PALE = "#ffffff", "#1f2933", "#5b6673"
"""The card is opaque, so that the picture is legible on a light and on a dark page."""
OWN, NEIGHBOUR, PADDING = "#9ecae8", "#dfe5ea", "#f6f1e6"
ALLOWED, FORBIDDEN, CUT = "#12703f", "#b3261e", "#8a949e"
ANSWERS = 9.4
"""The left edge of the column of answers, in cells."""


def cell(axes: Axes, x: float, y: float, text: str, colour: str, *, padding: bool = False) -> None:
    """Draw one position of a sequence. Padding is hatched."""
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor=INK, lw=0.9, hatch="///" if padding else None))
    if not padding:
        axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=11, color=INK)


def grid(axes: Axes, x: float, y: float, mark: str = "") -> None:
    """Draw all three sequences, padded. `mark` follows each name, so that answers differ from inputs."""
    for place, (name, length) in enumerate(LENGTHS):
        for position in range(PADDED):
            padding = position >= length
            colour = PADDING if padding else OWN if name == "A" else NEIGHBOUR
            cell(axes, x + position, y - place, f"{name}{mark}{position + 1}", colour, padding=padding)


def arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float], colour: str, bend: float) -> None:
    """Draw one influence. A forbidden one is dashed and crossed out."""
    allowed = colour != FORBIDDEN
    style = "-" if allowed else (0, (4, 2.5))
    axes.add_patch(
        FancyArrowPatch(
            begin,
            end,
            arrowstyle="-|>",
            mutation_scale=13,
            lw=1.9,
            color=colour,
            linestyle=style,
            connectionstyle=f"arc3,rad={bend}",
            zorder=3,
        )
    )


def struck(axes: Axes, x: float, y: float) -> None:
    """Draw a cross on a forbidden arrow."""
    axes.text(x, y, "✕", ha="center", va="center", fontsize=15, color=FORBIDDEN, weight="bold", zorder=4)


def picture() -> Figure:
    """Draw run 1 above, run 2 below, and the legend."""
    drawn = Figure(figsize=(8, 4.9), facecolor=CARD)
    axes = drawn.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.5, 15.9), ylim=(-2.35, 7.695))
    axes.axis("off")
    axes.text(0, 7.2, "Run 1: A alone", fontsize=12, weight="bold", color=INK)
    axes.text(ANSWERS, 7.2, "its answer", fontsize=12, weight="bold", color=INK)
    for position in range(3):
        cell(axes, position, 5.85, f"A{position + 1}", OWN)
        cell(axes, ANSWERS + position, 5.85, f"A{position + 1}", OWN)
        arrow(axes, (position + 0.5, 5.8), (ANSWERS + 1.4, 5.8), ALLOWED, 0.13 - 0.02 * position)
    axes.text(0, 4.05, "Run 2: A in a batch, padded", fontsize=12, weight="bold", color=INK)
    axes.text(ANSWERS, 4.05, "answers", fontsize=12, weight="bold", color=INK)
    grid(axes, 0, 2.3)
    grid(axes, ANSWERS, 2.3)
    target = (ANSWERS + 1.35, 3.32)
    for position in (0, 1, 2):
        arrow(axes, (position + 0.5, 3.32), target, ALLOWED, -0.10)
    arrow(axes, (5.95, 2.8), (ANSWERS - 0.02, 2.9), FORBIDDEN, -0.05)
    struck(axes, 7.7, 2.92)
    arrow(axes, (5.95, 1.8), (ANSWERS - 0.02, 2.5), FORBIDDEN, 0.08)
    struck(axes, 7.7, 2.03)
    arrow(axes, (ANSWERS + 2.5, 5.75), (ANSWERS + 2.5, 3.42), INK, 0)
    axes.text(ANSWERS + 2.85, 4.65, "must be equal", fontsize=11, color=INK, va="center")
    arrow(axes, (4.5, 0.28), (ANSWERS + 4.5, 0.28), CUT, 0.12)
    legend(axes)
    return drawn


def legend(axes: Axes) -> None:
    """Draw the meaning of the arrows and the cells."""
    rows = (
        (ALLOWED, "own positions: any influence is allowed"),
        (FORBIDDEN, "padding and neighbours: no influence may reach A's own part"),
        (CUT, "padding may change padding: it is cut off the answer"),
    )
    for place, (colour, text) in enumerate(rows):
        y = -0.95 - 0.52 * place
        arrow(axes, (0, y), (1.2, y), colour, 0)
        axes.text(1.45, y, text, fontsize=10.5, color=INK, va="center")
    for place, (colour, padding, text) in enumerate(
        ((OWN, False, "A's own"), (NEIGHBOUR, False, "a neighbour's"), (PADDING, True, "padding"))
    ):
        y = -1.15 - 0.52 * place
        axes.add_patch(
            Rectangle((11.9, y), 0.6, 0.4, facecolor=colour, edgecolor=INK, lw=0.9, hatch="///" if padding else None)
        )
        axes.text(12.75, y + 0.2, text, fontsize=10.5, color=INK, va="center")


def main() -> None:
    """Draw and save."""
    picture().savefig(PICTURE, dpi=200, metadata={"Software": None})
    print("docs/images/neighbours.png")


if __name__ == "__main__":
    main()
