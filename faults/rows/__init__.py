"""The rows of the table of faults, in the order of their numbers."""

from __future__ import annotations

from faults.lab import Row
from faults.rows import batches, callers, inputs, machine, models, overload, processes, replicas, strangers, surface

ROWS: tuple[Row, ...] = tuple(
    sorted(
        (
            row
            for module in (
                inputs, batches, callers, replicas, machine, strangers, surface, processes, models, overload,
            )
            for row in module.ROWS
        ),
        key=lambda row: row.number,
    )
)  # fmt: skip
