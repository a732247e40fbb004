"""Write the results of a command: JSON to standard output, pages and pictures to files.

A file that cannot be written ends the command with exit code 2.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer

from attnserve_client import AttentionFeatures, AttentionMap
from attnserve_client._svg_views import View


def print_json(value: Any) -> None:
    """Print JSON on one line."""
    # JSON escapes control characters, so that texts cannot control a terminal.
    sys.stdout.write(json.dumps(value) + "\n")


def write(path: Path, data: bytes) -> None:
    """Write a file.

    Raises:
        BadParameter: It cannot be written.
    """
    try:
        path.write_bytes(data)
    except OSError as error:
        raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from None


def write_png(path: Path, shown: AttentionMap | AttentionFeatures) -> None:
    """Draw a map, or features, into a PNG file.

    Raises:
        BadParameter: matplotlib is missing, or the file cannot be written.
    """
    try:
        figure = shown.plot()
    except ImportError as error:
        raise typer.BadParameter(str(error), param_hint="--png") from None
    try:
        figure.savefig(path, format="png", dpi=120, bbox_inches="tight")
    except OSError as error:
        raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from None


def write_svg(path: Path, shown: AttentionMap, view: View, *, keep_special: bool, all_links: bool) -> None:
    """Draw a map into an SVG file.

    Raises:
        BadParameter: The map has no such view, or the file cannot be written.
    """
    try:
        drawing = shown.to_svg(
            view, include_self=all_links, exclude_special=not keep_special, exclude_punctuation=not all_links
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--view") from None
    write(path, drawing.encode())
