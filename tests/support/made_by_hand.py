"""What every manifest that a test makes by hand says of where it comes from and how it was checked: nothing."""

from __future__ import annotations

from attnserve_server.model.manifest import CheckReport, Provenance

PROVENANCE = Provenance(source="test", exporter="test", opset=20, created="2026-01-01T00:00:00Z")
CHECK = CheckReport(
    against="test",
    lengths=(),
    output_max_abs_error=0,
    output_tolerance=0,
    weight_max_abs_error=0,
    weight_tolerance=0,
    row_sum_max_abs_error=0,
)
