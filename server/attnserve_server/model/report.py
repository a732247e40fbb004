"""Parts of a manifest that record its conversion: the source, the final check, each optional step, row features.

An unknown field, and an error or a time that is not finite, raise pydantic's ValidationError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from attnserve_server.domain.values import AttentionFeature
from attnserve_server.model.frozen import Frozen, Sha256


class Provenance(Frozen):
    """The origin of a bundle. `source` is a name, never a path of the converting machine."""

    source: str
    source_sha256: Sha256 | None = None
    exporter: str
    opset: int
    created: str
    versions: dict[str, str] = Field(default_factory=dict)
    solved: tuple[str, ...] = ()
    """What was solved for or fixed about the axes of inputs, each with its reason, for people."""
    target: str = "CPUExecutionProvider"
    """The execution provider on which alternatives of the graph were compared: the fastest one there was kept."""


class UnfusedSite(Frozen):
    """A decomposed site that is not rewritten to a fused operator: its name, and the reason."""

    site: str
    reason: str


class FusionReport(Frozen):
    """Result of rewriting decomposed sites to a fused operator, before taps are added.

    Args:
        operator: the fused operator; empty if no site can be rewritten.
        sites: number of rewritten sites.
        kept: whether the rewritten graph was kept.
        fused_over_source_time: run time divided by that of the source; None: not measured.
        output_max_abs_error: greatest difference to the source; None: not measured.
        reason: why the rewritten graph was not kept; empty if it was.
        unfused: the other decomposed sites. Sites that were attention operators before are not among them.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    operator: str
    sites: int
    kept: bool
    fused_over_source_time: float | None = None
    output_max_abs_error: float | None = None
    reason: str = ""
    unfused: tuple[UnfusedSite, ...] = ()

    def __str__(self) -> str:
        """Format as one line."""
        parts = _grouped([(unfused.site, unfused.reason) for unfused in self.unfused], "not fused")
        if self.sites:
            sites = "site" if self.sites == 1 else "sites"
            where = f"{self.sites} attention {sites} rewritten to {self.operator}"
            kept = f": {self.fused_over_source_time:.3f} of the source's time"
            parts.insert(0, where + (kept if self.kept else f", but not kept: {self.reason}"))
        return "; ".join(parts)


def _grouped(named: Sequence[tuple[str, str]], what: str) -> list[str]:
    """Format names and reasons, one entry for each reason: the first name, and how many more have it."""
    entries: list[str] = []
    for reason in dict.fromkeys(reason for _, reason in named):
        names = [name for name, own in named if own == reason]
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        entries.append(f"{names[0]}{others} {what}: {reason}")
    return entries


class TrialReport(Frozen):
    """Result of one change that was tried to make a bundle faster, compared with the bundle without it.

    Args:
        what: the change.
        kept: whether it was kept.
        time: run time divided by that without the change; None: not measured.
        load_time: load time divided by that without the change; None: not relevant.
        output_max_abs_error: greatest difference of the outputs; None: not measured.
        reason: why it was not kept; empty if it was.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    what: str
    kept: bool = False
    time: float | None = None
    load_time: float | None = None
    output_max_abs_error: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        """Format as one line."""
        loading = "" if self.load_time is None else f", and {self.load_time:.2f} of the time to load"
        if self.kept:
            return f"tried {self.what}: kept, at {self.time or 0:.3f} of the time{loading}"
        return f"tried {self.what}: not kept, {self.reason}{loading}"


class LeftQuantizer(Frozen):
    """A dynamic quantizer that keeps one scale for the whole batch: the name of its node, and the reason."""

    node: str
    reason: str


class RequantizeReport(Frozen):
    """Result of `prepare --requantize per-row`.

    Speed and difference to the source are in `CheckReport.quality`.

    Args:
        rewritten: number of dynamic quantizers that now take one scale and zero point per row.
        unrounded: number of removed quantizers, of a MatMul of two activations, which now runs in float32.
        left: the quantizers that still take one scale for the whole batch.
    """

    rewritten: Annotated[int, Field(ge=0)]
    unrounded: Annotated[int, Field(ge=0)] = 0
    left: tuple[LeftQuantizer, ...] = ()

    def __str__(self) -> str:
        """Format as one line."""
        total = self.rewritten + self.unrounded + len(self.left)
        lines = [f"{self.rewritten} of {total} dynamic quantizers rewritten to one scale per row"]
        if self.unrounded:
            lines.append(f"{self.unrounded} removed: their MatMul of two activations runs in float32")
        lines += _grouped([(left.node, left.reason) for left in self.left], "not rewritten")
        return "; ".join(lines)


class QualityReport(Frozen):
    """Cost and gain of a reduced precision, measured on many sequences against the graph that it was made from.

    Args:
        against: the reference.
        inputs: the source of the sequences.
        sequences: number of sequences.
        output: the output that was compared.
        cosine_mean: mean cosine between the outputs, averaged over positions if it has them.
        cosine_worst: least cosine of a sequence.
        top1_agreement: share of attention rows (site, head, query) whose strongest key is the same; None without sites.
        attention_rows: number of compared rows.
        speed_ratio: processor time of the reference divided by that of the reduced graph, in interleaved runs.
        output_max_abs_error: greatest absolute difference of any number of `output`.
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
    """Golden answers: stored in `golden.npz` by the conversion, and checked again at every load.

    Errors are relative to the greatest stored number of an array.

    Args:
        sequences: number of sequences.
        sample: maximum number of stored numbers of each array, evenly spread.
        output_tolerance: maximum error of an output.
        weight_tolerance: maximum error of weights.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    sequences: Annotated[int, Field(ge=1, le=16)]
    sample: Annotated[int, Field(ge=1)]
    output_tolerance: Annotated[float, Field(gt=0)]
    weight_tolerance: Annotated[float, Field(gt=0)]


class CheckReport(Frozen):
    """Result of the check at the end of a conversion.

    Args:
        against: the reference, in words.
        lengths: of the sequences that were run.
        output_max_abs_error: greatest difference of the outputs.
        output_tolerance: maximum of it.
        weight_max_abs_error: greatest difference of the weights or, if the reference has none, of weights @ value.
        weight_tolerance: maximum of it.
        row_sum_max_abs_error: greatest distance from 1 of the sum of a row of weights.
        padding_max_abs_error: in bundles of format 1 only; the certificate replaces it.
        tapped_over_source_time: run time with taps divided by that of the source; None: not measured.
        fusion: the rewriting of sites to fused operators; None: nothing to report.
        trials: changes that were tried for speed.
        requantize: the rewriting of dynamic quantizers; None: not requested.
        quality: cost and gain of a reduced precision; None: not measured.
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


class ReferenceFeatures(Frozen):
    """The distributions of row features on known texts, with which those of requests are compared.

    Args:
        inputs: the texts, in words.
        sequences: how many there are.
        buckets: upper bounds of the buckets of each feature, ascending; the last bucket has none.
        sites: by site and feature, the number of rows in each bucket, over all heads.
    """

    inputs: str
    sequences: Annotated[int, Field(ge=1)]
    buckets: dict[AttentionFeature, tuple[float, ...]]
    sites: dict[str, dict[AttentionFeature, tuple[Annotated[int, Field(ge=0)], ...]]]

    @model_validator(mode="after")
    def _counts_fit_buckets(self) -> Self:
        for site, features in self.sites.items():
            for feature, counts in features.items():
                if len(counts) != len(self.buckets.get(feature, ())) + 1:
                    raise ValueError(f"reference_features: {site} has {len(counts)} counts of {feature}")
        return self
