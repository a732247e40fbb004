"""One verdict on each output and each tap, for the batch and for each axis that could be padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import onnx

from attnserve_server.build.inputs.signature import Signature
from attnserve_server.model.certificate import Clause, MaskNeed, Verdict
from attnserve_server.model.manifest import BATCH, DerivedLength, OutputSpec, SiteSpec


@dataclass(frozen=True, slots=True)
class Proof:
    """What was proved, and what an attack should aim at."""

    clauses: tuple[Clause, ...]
    """Of the batch, then of each symbol of the signature."""
    masks: tuple[MaskNeed, ...] = ()
    """What the clauses take for granted of requests."""
    causal_sites: frozenset[str] = frozenset()
    """Sites whose queries provably look at no key behind them."""
    thresholds: tuple[int, ...] = ()
    """Lengths and counts that the graph compares with, strides, widths of windows: what lengths should straddle."""


def prove(
    proto: onnx.ModelProto,
    signature: Signature,
    outputs: Sequence[OutputSpec],
    sites: Sequence[SiteSpec],
    *,
    max_lengths: Mapping[str, int] = MappingProxyType({}),
    derived: Mapping[str, DerivedLength] = MappingProxyType({}),
    precision: str = "fp32",
) -> Proof:
    """Follow every value of a tapped graph from its inputs to its outputs.

    Args:
        proto: the tapped graph.
        signature: its inputs, without the taps'.
        outputs: those that are served.
        sites: those that were found; unavailable ones are left out.
        max_lengths: the greatest length of each symbol.
        derived: the forms of symbols that are none of the inputs'.
        precision: what the graph computes in; decides what counts as equal.
    """
    del proto, max_lengths, derived, precision
    targets = [spec.name for spec in outputs] + [site.weights_output or "" for site in sites if site.available]
    verdicts = dict.fromkeys(targets, Verdict.UNKNOWN)
    reason = "not followed yet"
    return Proof(
        tuple(
            Clause(axis=axis, verdict=Verdict.UNKNOWN, reason=reason, targets=verdicts)
            for axis in (BATCH, *signature.symbols)
        )
    )
