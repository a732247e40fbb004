"""Where a bundle comes from, and what the check at its end saw."""

from __future__ import annotations

from typing import Annotated

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

    def __str__(self) -> str:
        """One line for a person."""
        sites = "site" if self.sites == 1 else "sites"
        where = f"{self.sites} attention {sites} rewritten to {self.operator}"
        if self.kept:
            return f"{where}: {self.fused_over_source_time:.3f} of the source's time"
        return f"{where}, but not kept: {self.reason}"


class TrialReport(Frozen):
    """What came of one thing that was tried to make a bundle faster, beside the same bundle without it.

    `what`: in words. Time and error are None where it did not come to that. `load_time`: how long it takes to load, in
    parts of the other's time, where that is what it is about. `reason`: why it was not kept; empty where it was.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    what: str
    kept: bool = False
    time: float | None = None
    load_time: float | None = None
    output_max_abs_error: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        """One line for a person."""
        loading = "" if self.load_time is None else f", and {self.load_time:.2f} of the time to load"
        if self.kept:
            return f"tried {self.what}: kept, at {self.time or 0:.3f} of the time{loading}"
        return f"tried {self.what}: not kept, {self.reason}{loading}"


class LeftQuantizer(Frozen):
    """A dynamic quantizer that keeps one scale for the whole batch. `node`: its name; `reason`: why, in words."""

    node: str
    reason: str


class RequantizeReport(Frozen):
    """Result of `prepare --requantize per-row`.

    `rewritten`: the number of dynamic quantizers that now take one scale and zero point per row. `unrounded`: of those
    that were removed, because they rounded an operand of a product of two activations, which now runs in float32.
    `left`: those that still take one scale for the whole batch. Speed and difference to the source are in `quality`.
    """

    rewritten: Annotated[int, Field(ge=0)]
    unrounded: Annotated[int, Field(ge=0)] = 0
    left: tuple[LeftQuantizer, ...] = ()

    def __str__(self) -> str:
        """One line for a person."""
        total = self.rewritten + self.unrounded + len(self.left)
        lines = [f"{self.rewritten} of {total} dynamic quantizers rewritten to one scale per row"]
        if self.unrounded:
            lines.append(f"{self.unrounded} removed, their products of two activations run in float32")
        for reason in dict.fromkeys(left.reason for left in self.left):
            nodes = [left.node for left in self.left if left.reason == reason]
            others = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
            lines.append(f"{nodes[0]}{others} not rewritten: {reason}")
        return "; ".join(lines)


class QualityReport(Frozen):
    """What a reduced precision costs and brings, seen on many sequences and against the graph that it was made from.

    `output`: whose cosine is told, as a mean and for the worst sequence; averaged over positions where it has them.
    `top1_agreement`: the share of attention rows (site, head, query) whose strongest key is the same; None without
    sites. `speed_ratio`: processor time of the reference over that of the reduced graph, in interleaved runs.
    `output_max_abs_error`: the greatest absolute difference of any number of `output`.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    against: str
    inputs: str
    sequences: Annotated[int, Field(ge=1)]
    output: str
    cosine_mean: float
    cosine_worst: float
    top1_agreement: float | None = None
    attention_rows: Annotated[int, Field(ge=0)] = 0
    speed_ratio: float | None = None
    output_max_abs_error: float | None = None

    def __str__(self) -> str:
        """Return one line for a person."""
        rows = "" if self.top1_agreement is None else f", {self.top1_agreement:.1%} of attention rows agree"
        speed = "" if self.speed_ratio is None else f", {self.speed_ratio:.2f} times as fast"
        cosine = f"cosine of {self.output} {self.cosine_mean:.4f}, at worst {self.cosine_worst:.4f}"
        apart = "" if self.output_max_abs_error is None else f", numbers within {self.output_max_abs_error:.2g}"
        return f"on {self.inputs}, beside {self.against}: {cosine}{apart}{rows}{speed}"


class GoldenSpec(Frozen):
    """Answers that were checked when the bundle was made, kept in `golden.npz`, and asked for again at every load.

    Of each array at most `sample` numbers are kept, evenly spread. Errors are told in parts of the greatest number of
    the kept ones; more than `output_tolerance` or `weight_tolerance` is another model.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    sequences: Annotated[int, Field(ge=1, le=16)]
    sample: Annotated[int, Field(ge=1)]
    output_tolerance: Annotated[float, Field(gt=0)]
    weight_tolerance: Annotated[float, Field(gt=0)]


class CheckReport(Frozen):
    """What the check at the end of export or prepare saw; the reference is named in `against`.

    `padding_max_abs_error`: in bundles of format 1 alone; what padding can change is the certificate's to say.
    """

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
    trials: tuple[TrialReport, ...] = ()
    requantize: RequantizeReport | None = None
    quality: QualityReport | None = None
