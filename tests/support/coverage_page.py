"""`docs/coverage.md`: how its rows are written, and which of its columns are the same on every machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

HEAD = """<!-- Written by `make coverage`; not by hand. -->

# Coverage

Every architecture here is built by Hugging Face transformers at tiny size with random weights, traced by each of
torch's exporters, tapped, and compared with the model's own eager attention: one padded batch of mixed lengths, of
which every sequence's own part counts. Models of the zoo are compared with their definition. Weights of windowed sites
are compared where they stand among all keys. What an architecture needs beyond that is in
[architectures.md](architectures.md).

- **exporter**: `dynamo` is `torch.onnx.export(dynamo=True)`, `torchscript` the older one. From opset 23, attention is
  one operator for dynamo; below it, and for TorchScript always, it is computed step by step.
- **precision**: `fp16` and `int8` are the same graph, as `--precision` makes them; the reference stays float32.
- **sites**: those whose weights can be had, of all places where the model computes attention.
- **weight error**, **output error**: the greatest absolute difference. The limits are 1e-5 and 1e-4 in
  float32, 1e-2 and 2e-2 in float16; last digits differ from machine to machine. In int8 they say little: these weights
  are random. What eight bits do to a real model is measured in [precision.md](precision.md).
- **batching**: what the proof says of padding and of batch neighbours, as [batching.md](batching.md) explains it. Where
  not all is proved, the axis, its verdict and the reason: such sequences share a batch at equal lengths only.
- **time**: CPU time of the prepared graph over its source's while nobody asks for weights. These models are so small
  that it mostly counts nodes, and it differs from run to run.

"""
COLUMNS = (
    "architecture", "exporter", "opset", "precision", "sites", "weight error", "output error", "batching", "time",
    "note",
)  # fmt: skip
_SETTLED = (0, 1, 2, 3, 4, 7, 9)
"""The columns that do not depend on the machine."""

Settled = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """One graph of one architecture. Errors and time are None where there is nothing to measure; `note` says why."""

    architecture: str
    exporter: str
    opset: int
    precision: str
    found: int
    expected: int
    weight_error: float | None = None
    output_error: float | None = None
    batching: str = ""
    time: float | None = None
    note: str = ""

    def row(self) -> tuple[str, ...]:
        """As text, one for each column."""
        return (
            self.architecture,
            self.exporter,
            str(self.opset),
            self.precision,
            f"{self.found}/{self.expected}",
            _rounded(self.weight_error),
            _rounded(self.output_error),
            self.batching or "-",
            "-" if self.time is None else f"{self.time:.2f}",
            self.note.replace("|", "/"),
        )

    @property
    def explained(self) -> bool:
        """Whether every blank has its reason."""
        return bool(self.note) or (self.found == self.expected and "-" not in self.row()[5:9])


def rendered(cells: Iterable[Cell]) -> str:
    """The page."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(cell.row() for cell in cells)]
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def settled(page: str) -> list[Settled]:
    """The columns of a page that are the same on every machine, without its head."""
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    return [tuple(_cell(row, column) for column in _SETTLED) for row in rows[2:]]


def _cell(row: Sequence[str], column: int) -> str:
    return row[column].strip() if column < len(row) else ""


def _rounded(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"
