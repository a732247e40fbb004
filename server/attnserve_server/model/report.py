"""Where a bundle comes from, and what the check at its end saw."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from attnserve_server.model.frozen import Frozen, Sha256


class Provenance(Frozen):
    """Where a bundle comes from. `source` is a name, never a path of the machine that built it."""

    source: str
    source_sha256: Sha256 | None = None
    exporter: str
    opset: int
    created: str
    versions: dict[str, str] = Field(default_factory=dict)


class FusionReport(Frozen):
    """What came of rewriting decomposed sites to a fused operator before they were tapped.

    `sites`: how many were rewritten. Time and error are against the source, untapped; None where it did not come to
    that. `reason`: why the rewritten graph was not kept; empty where it was.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    operator: str
    sites: int
    kept: bool
    fused_over_source_time: float | None = None
    output_max_abs_error: float | None = None
    reason: str = ""


class CheckReport(Frozen):
    """What the check at the end of export or prepare saw; the reference is named in `against`."""

    model_config = ConfigDict(allow_inf_nan=False)

    against: str
    lengths: tuple[int, ...]
    output_max_abs_error: float
    output_tolerance: float
    weight_max_abs_error: float
    weight_tolerance: float
    row_sum_max_abs_error: float
    padding_max_abs_error: float | None = None
    tapped_over_source_time: float | None = None
    fusion: FusionReport | None = None
