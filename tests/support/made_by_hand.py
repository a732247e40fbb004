"""The parts of manifests that tests make by hand: provenance, check, and a certificate.

A certificate states, for the batch and each axis, whether sequences may share a run: whether other rows or padding can
change their answers. A clause that the server's classes refuse raises pydantic's ValidationError.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnserve_server.model.certificate import AttackReport, Certificate, Clause, MaskNeed, Verdict
from attnserve_server.model.manifest import BATCH, CheckReport, Provenance

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
SURVIVED = AttackReport(probes=20, seconds=1.0, worst=0.1)


def proved(*symbols: str, masks: Sequence[MaskNeed] = ()) -> Certificate:
    """Return a certificate that proves the batch, and padding along each of these axes."""
    return certificate(**dict.fromkeys((BATCH, *symbols), Verdict.PROVED), masks=tuple(masks))


def certificate(
    *, masks: tuple[MaskNeed, ...] = (), clauses: Sequence[Clause] = (), **verdicts: Verdict
) -> Certificate:
    """Return a certificate with the test's own clauses, followed by a plain clause for each verdict, by axis."""
    plain = (
        Clause(axis=axis, verdict=verdict, reason="" if verdict is Verdict.PROVED else "made by hand")
        for axis, verdict in verdicts.items()
    )
    return Certificate(clauses=(*clauses, *plain), masks=masks)
