"""Texts about batching for GetModel, reports and warnings: what a certificate permits under a policy, and why.

A certificate has a verdict for the batch and each axis: whether batch neighbours or padding can change an answer. The
rules themselves are in `certificate`. A certificate without a clause for an axis of its manifest raises KeyError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from attnserve_server.model.certificate import Batching, Certificate, Clause, PathStep, Verdict
from attnserve_server.model.manifest import BATCH, Manifest

NO_CERTIFICATE: Final = "the bundle is of format 1 and has no certificate"
_DYNAMIC: Final = "DynamicQuantize"
"""Start of the names of the operators that take one scale for their whole input."""


@dataclass(frozen=True, slots=True)
class Ruling:
    """What a policy permits for the batch, or for one axis.

    Args:
        axis: `batch`, or the symbol of an axis.
        allowed: whether rows of the batch share runs, or sequences are padded along the axis.
        status: `proved`, `tested`, `refuted` or `unknown`.
        reason: why it is not proved; empty if it is.
    """

    axis: str
    allowed: bool
    status: str
    reason: str

    def __str__(self) -> str:
        """Format as one line of a report."""
        what = "batch" if self.axis == BATCH else f"axis {self.axis}"
        effect = (
            ("rows share runs" if self.allowed else "rows run alone")
            if self.axis == BATCH
            else ("padded" if self.allowed else "equal lengths only")
        )
        return f"{what}: {self.status}, {effect}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True, slots=True)
class Caution:
    """A warning for the operator: the effect along an axis, its cause and its remedy."""

    axis: str
    status: str
    effect: str
    cause: str
    remedy: str

    def __str__(self) -> str:
        """Format as one sentence."""
        cause = f": {self.cause}" if self.cause else ""
        return f"{self.effect} ({self.status}){cause}; {self.remedy}"


def rulings(manifest: Manifest, batching: Batching) -> tuple[Ruling, ...]:
    """Return the ruling for the batch, then for each axis of variable length. Derived axes have that of their source.

    Args:
        manifest: as stored, or from `Manifest.under`.
        batching: the policy.
    """
    own = [axis for axis in manifest.axes if not axis.formula]  # a formula adds no ruling to those of its symbols
    followed = {axis.symbol: axis.derived.source if axis.derived else axis.symbol for axis in own}
    changing = {symbol: source for symbol, source in followed.items() if not manifest.axis(source).fixed}
    return tuple(_ruling(manifest, batching, axis, source) for axis, source in {BATCH: BATCH, **changing}.items())


def _ruling(manifest: Manifest, batching: Batching, axis: str, source: str) -> Ruling:
    certificate = manifest.certificate
    if certificate is None:
        return Ruling(axis, axis == BATCH and batching != "off", str(Verdict.UNKNOWN), NO_CERTIFICATE)
    clause = certificate.clause(source)
    return Ruling(axis, clause.allows(batching), clause.status(batching), _cause(clause))


def cautions(certificate: Certificate | None, batching: Batching, *, alone: bool = False) -> tuple[Caution, ...]:
    """Return a warning for each limit on batching under a policy, and for each finite mask without a proof.

    Args:
        certificate: of the model; None: it has none.
        batching: the policy; none for `off`, because the operator chose to disable batching.
        alone: whether sequences run alone under any policy; then there is no warning about the batch.
    """
    if batching == "off":
        return ()
    if certificate is None:
        effect = "sequences share a batch only at equal lengths"
        remedy = "`attnserve-server check BUNDLE --certify` writes a version with a certificate"
        return (Caution(BATCH, str(Verdict.UNKNOWN), effect, NO_CERTIFICATE, remedy),)
    found = (_caution(clause, batching) for clause in certificate.clauses)
    return tuple(caution for caution in found if caution is not None and not (alone and caution.axis == BATCH))


def _caution(clause: Clause, batching: Batching) -> Caution | None:
    status = clause.status(batching)
    if clause.allows(batching):
        if not (clause.finite_mask and status == "tested"):
            return None
        what = "batches are shared" if clause.axis == BATCH else f"axis {clause.axis!r} is padded"
        probes = clause.attack.probes if clause.attack else 0
        effect = f"{what} without a proof: {probes} probes did not change an answer"
        remedy = "`--batching off` runs every sequence alone, and a mask of booleans or -inf can be proved"
        return Caution(clause.axis, status, effect, _cause(clause) or "finite mask, unbounded scores", remedy)
    effect = (
        "every sequence runs alone"
        if clause.axis == BATCH
        else f"only sequences of one length along {clause.axis!r} share a batch"
    )
    return Caution(clause.axis, status, effect, _cause(clause), _remedy(clause))


def _cause(clause: Clause) -> str:
    """The reason, with the deciding node and, if an attack changed an answer, its probe."""
    reason = clause.reason
    if clause.path and not any(step.node in reason for step in clause.path):
        deciding = _deciding(clause)
        reason = f"{reason}, at {deciding.operator} {deciding.node!r}".removeprefix(", ")
    if clause.attack is not None and clause.attack.broke:
        reason = f"{reason}; an answer changed with {clause.attack.broke}".removeprefix("; ")
    return reason


def _deciding(clause: Clause) -> PathStep:
    """The step that the reason describes; else the last step, whose output is the first one that differs."""
    return next((step for step in clause.path if step.words and step.words in clause.reason), clause.path[-1])


def _remedy(clause: Clause) -> str:
    if _DYNAMIC in clause.reason or (clause.path and _deciding(clause).operator.startswith(_DYNAMIC)):
        return "`attnserve-server prepare --requantize per-row` gives every row its own scale"
    shown = "`attnserve-server inspect --batching BUNDLE` shows the path"
    return f"{shown}; then `--batching tested` accepts it" if clause.allows("tested") else shown
