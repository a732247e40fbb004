"""Writes cases for `bench.foreign`, which serves and compares them: a file of a tool, its inputs, its source's answers.

The source is the model that the tool converts. The other scripts here, the makers, run in environments of other
people's tools, so this module imports NumPy alone. `Cases` raises FileExistsError if its folder has a case of that
name, and PackageNotFoundError if the tool is not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

Arrays = Mapping[str, "np.ndarray[Any, Any]"]


class Cases:
    """The cases that one maker writes into a folder.

    Each case is a folder with `case.json`, the file, `inputs.npz`, and, where the source could be run,
    `outputs.npz` and `weights.npz`. Arrays are named `NUMBER/NAME` by sequence, without the batch axis.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(  # noqa: PLR0913 - the parts of a case
        self,
        tool: str,
        package: str,
        model: str,
        file: Callable[[Path], Path],
        sequences: Sequence[Arrays],
        *,
        outputs: Sequence[Arrays] = (),
        weights: Sequence[Arrays] = (),
        sites: int = 0,
        flags: Sequence[str] = (),
        note: str = "",
        words: bool = False,
    ) -> None:
        """Write a case, or the reason why its tool could not make the file.

        Args:
            tool: the tool, with its options, as its users name it.
            package: the package whose version is stated.
            model: the model.
            file: writes the file into a folder, and returns its path.
            sequences: inputs of each sequence by name.
            outputs: answers of the source to each sequence; empty: the file alone is the reference.
            weights: attention of the source for each sequence, (H, L, S) by layer number; empty: not known.
            sites: number of sites that the model has; 0: not known.
            flags: options of `attnserve-server prepare` that its user would give.
            note: what a reader of the table needs beside the figures.
            words: whether the tool copies `models.word_tokenizer` beside the file, so that texts can be sent.

        Raises:
            FileExistsError: another case has this tool and model.
            PackageNotFoundError: `package` is not installed.
        """
        name = _plain(f"{tool} {model}")
        place = self.folder / name
        place.mkdir()
        facts: dict[str, Any] = {
            "tool": tool,
            "version": f"{package} {metadata.version(package)}",
            "model": model,
            "sites": sites,
            "flags": list(flags),
            "note": note,
            "words": words,
        }
        try:
            facts["file"] = str(file(place).relative_to(place))
        except Exception as error:  # noqa: BLE001 - a tool may fail in any way, and the table states how
            traceback.print_exc(file=sys.stderr)
            facts["failed"] = f"{type(error).__name__}: {_first_line(str(error))}"
        for kind, rows in (("inputs", sequences), ("outputs", outputs), ("weights", weights)):
            if rows:
                arrays = {f"{number}/{key}": array for number, row in enumerate(rows) for key, array in row.items()}
                np.savez(place / f"{kind}.npz", **arrays)
        (place / "case.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")


@contextlib.contextmanager
def quiet() -> Any:
    """Keep the progress of tools and warnings off the terminal."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def cases_of_command_line(doc: str | None) -> Cases:
    """Return the cases of the folder that the command line names. Exits with code 2 without one."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("folder", type=Path)
    return Cases(parser.parse_args().folder)


def _first_line(text: str) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", re.sub(r"/\S*/(?=site-packages/)", "", text))
    lines = [line for line in plain.splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"


def _plain(text: str) -> str:
    return "-".join("".join(sign if sign.isalnum() else " " for sign in text.lower()).split())
