"""Tables of graphs, by what their operators do, each with the right verdicts."""

from __future__ import annotations

from proof_cases import Case

from proof_tables import attention, control, masks, moving, pointwise, reducing, sliding, taking

TABLES: dict[str, list[Case]] = {
    "pointwise": pointwise.CASES,
    "reducing": reducing.CASES,
    "sliding": sliding.CASES,
    "moving": moving.MOVED,
    "taking": taking.TAKEN,
    "masks": masks.MASKS,
    "sites": masks.SITES,
    "attention": attention.OPERATORS,
    "control": control.CONTROL,
    "quantized": control.QUANTIZED,
}
