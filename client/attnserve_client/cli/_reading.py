"""Read the texts and arrays of a command from its arguments, standard input and files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import typer

from attnserve_client.data_types import Input


def read_texts(given: list[str], *, whole: bool = False) -> list[str]:
    """Replace `-` by standard input: each of its lines, or with `whole` all of it as one text.

    Raises:
        BadParameter: There is no text.
    """
    texts: list[str] = []
    for text in given:
        if text != "-":
            texts.append(text)
        elif whole:
            texts.append(sys.stdin.read().strip())
        else:
            texts.extend(line for line in sys.stdin.read().splitlines() if line.strip())
    if not texts:
        raise typer.BadParameter("standard input has no text; pass at least one line", param_hint="TEXT")
    return texts


def read_input(text: str, pair: str, arrays: dict[str, npt.NDArray[Any]]) -> Input:
    """Return one input of the client from a text, a second text and arrays; an empty second text: none."""
    if arrays:
        return (text, pair, arrays) if pair else (text, arrays)
    return (text, pair) if pair else text


def read_arrays(given: list[str]) -> dict[str, npt.NDArray[Any]]:
    """Read arrays from `.npy` files, given as NAME=FILE. Pickled objects are refused, because loading them runs code.

    Raises:
        BadParameter: An entry has another form, or a file cannot be read as one array.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    for entry in given:
        name, equals, file = entry.partition("=")
        if not (name and equals and file):
            raise typer.BadParameter(f"{entry!r} is not NAME=FILE.npy", param_hint="--tensor")
        try:
            # Not np.load: it also accepts .npz archives, and leaves them open.
            with Path(file).open("rb") as stream:
                arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
        except OSError as error:
            raise typer.BadParameter(f"cannot read {file}: {error.strerror or error}", param_hint="--tensor") from None
        except (ValueError, EOFError):
            raise typer.BadParameter(f"{file} is not a .npy file of one array", param_hint="--tensor") from None
    return arrays
