"""Render `docs/foreign.md`: tables of files that other people's tools write, one for each environment of such tools.

The rows are those of `bench.foreign.compare`. It writes no file, and raises nothing itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from bench.foreign.compare import Row

HEAD = """<!-- Written by `make foreign`; do not edit. -->

# Files of other tools

Each file here is written by a tool that is not part of attnserve, from a small model with random weights. `make
foreign` installs each tool in a separate environment, makes the files, converts them with `attnserve-server prepare`,
serves them, and sends each sequence alone, all of them together and, where the tool copies a tokenizer, as texts.

- **sites**: sites that give weights, of all sites of the bundle.
- **weight error**: the greatest difference of any weight from the model's eager attention. Where the file rounds, the
  conversion's own comparison with the file.
- **output error**: the greatest difference of any output, relative to the greatest output. Where the file rounds,
  from the file itself, run by onnxruntime with one sequence.
- **after a past**: for a decoder with a cache, the error of the second half of each sequence after the first, whose
  keys and values come from the server: of weights against eager attention, or, where the file rounds, of outputs
  against the file with the same past.
- **certificate**: the verdict on batches and padding. Where not all is proved: the axis and its verdict. Sequences
  then share a batch at equal lengths only, or run alone.

The limits are 1e-5 for weights and 1e-4 for outputs in float32, and 2e-2 in float16 and 5e-2 in int8 for outputs. The
last digits differ between machines. [Behaviours](behaviours.md) has what these tools do that is not expected.

"""
COLUMNS = ("tool", "version", "model", "sites", "weight error", "output error", "after a past", "certificate", "note")


def cells_of(row: Row) -> tuple[str, ...]:
    """Return a row as text, one cell for each column."""
    case = row.case
    return (
        case.tool,
        case.version,
        case.model,
        "-" if row.found is None else f"{row.found[0]}/{row.found[1]}",
        _rounded(row.weight_error),
        _rounded(row.output_error),
        row.past if isinstance(row.past, str) else _rounded(row.past),
        row.certificate or "-",
        "; ".join(note for note in (case.note, *row.notes) if note).replace("|", "/"),
    )


def is_explained(row: Row) -> bool:
    """Whether every blank has its reason, and nothing is wrong without an error."""
    return not row.wrong and ("-" not in cells_of(row)[3:8] or bool(row.notes or row.case.note))


def rendered(made: Mapping[str, Iterable[Row]], stored: str, order: Sequence[str]) -> str:
    """Return the page.

    Args:
        made: the rows of each environment of this run, by its name.
        stored: the page as it is; tables of environments that were not run are kept.
        order: the names of all environments, in the order of the page.
    """
    sections = {
        name: body.strip("\n") for name, body in re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", stored, re.MULTILINE)
    }
    sections |= {name: _table(rows) for name, rows in made.items()}
    return HEAD + "\n".join(f"## {name}\n\n{sections[name]}\n" for name in order if name in sections)


def _table(rows: Iterable[Row]) -> str:
    lines: list[Sequence[str]] = [COLUMNS, tuple("---" for _ in COLUMNS), *(cells_of(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rounded(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"
