"""A case as its maker wrote it: an ONNX file of another tool, its inputs, and the answers of its source.

A maker is a script in `makers`; the source is the model that the tool converts; a site is a place in a graph that
computes attention. `Case.read` raises OSError without `case.json`, which a maker writes last, ValueError if it is no
JSON, and KeyError if it lacks a fact. `cases_in` leaves out folders without `case.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One file of one tool.

    Attributes:
        name: of its folder, and of the model on the server.
        tool: the tool, with its options.
        version: the package and its version.
        model: the model.
        sites: number of sites that the model has; 0: not known.
        flags: options of `prepare`.
        note: what its maker states about it.
        words: whether the tokenizer beside the file makes token N of the word "wN".
        failed: why the tool made no file; empty if it did.
        file: the ONNX file; the folder of the case if the tool made none.
        sequences: inputs of each sequence by name, without the batch axis.
        outputs: answers of the source to each sequence; empty: the file alone is the reference.
        weights: attention of the source for each sequence, (H, L, S) by layer; empty: not known.
    """

    name: str
    tool: str
    version: str
    model: str
    sites: int
    flags: tuple[str, ...]
    note: str
    words: bool
    failed: str
    file: Path
    sequences: tuple[dict[str, Array], ...]
    outputs: tuple[dict[str, Array], ...]
    weights: tuple[dict[str, Array], ...]

    @classmethod
    def read(cls, folder: Path) -> Case:
        """Read the case in a folder."""
        facts = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        return cls(
            name=folder.name,
            tool=facts["tool"],
            version=facts["version"],
            model=facts["model"],
            sites=facts["sites"],
            flags=tuple(facts["flags"]),
            note=facts["note"],
            words=facts["words"],
            failed=facts.get("failed", ""),
            file=folder / facts.get("file", ""),
            sequences=_rows(folder / "inputs.npz"),
            outputs=_rows(folder / "outputs.npz"),
            weights=_rows(folder / "weights.npz"),
        )


def cases_in(folder: Path) -> list[Case]:
    """Return the cases in a folder, sorted by name."""
    return [Case.read(place.parent) for place in sorted(folder.glob("*/case.json"))]


def _rows(path: Path) -> tuple[dict[str, Array], ...]:
    if not path.exists():
        return ()
    rows: dict[int, dict[str, Array]] = {}
    with np.load(path) as stored:
        for key in stored.files:
            number, _, name = key.partition("/")
            rows.setdefault(int(number), {})[name] = stored[key]
    return tuple(rows[number] for number in sorted(rows))
