"""Render `docs/reference/coverage.md` from its cells, and name the columns that are the same on every machine.

A cell is one architecture through one exporter, opset and precision. It writes no file, and raises nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

HEAD = """<!-- Written by `make coverage`; do not edit. -->

# Coverage

Each architecture here is built by Hugging Face transformers at tiny size with random weights, traced by each of
torch's exporters, tapped, and compared with the model's own eager attention on one padded batch of mixed lengths.
Only each sequence's own positions are compared. Zoo models are compared with their definition. Weights of windowed
sites are laid out over all keys first. [architectures.md](architectures.md) lists what an architecture needs beyond
that. The proof's verdicts are explained in [batching.md](../explanation/batching.md).

- **exporter**: `dynamo` is `torch.onnx.export(dynamo=True)`, `torchscript` the older one. From opset 23, dynamo writes
  attention as one operator. Below it, and with TorchScript always, attention is decomposed.
- **precision**: `fp16` and `int8` are the same graph, converted by `--precision`. The reference stays float32.
- **sites**: sites whose weights can be tapped, of all sites of the model.
- **weight error**, **output error**: the greatest absolute difference. The limits are 1e-5 and 1e-4 in
  float32, 1e-2 and 2e-2 in float16. The last digits differ between machines. In int8 the figures mean little, because
  these weights are random. [precision.md](../explanation/precision.md) measures int8 on a real model.
- **batching**: the verdict on padding and on batch neighbours. Where not everything is proved: the axis, its verdict
  and the reason. Such sequences share a batch at equal lengths only.
- **time**: CPU time of the converted graph over its source's, where no request selects attention. These models are so
  small that the figure mostly counts nodes, and it differs between runs.

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
    """One graph of one architecture. Errors and time are None where there is nothing to measure; `note` states why."""

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
