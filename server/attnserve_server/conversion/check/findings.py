"""The request and the result of a check, and the findings on a certificate and on the quality of a precision.

A check compares a bundle, the folder of a converted model, with what it states. Nothing here runs a graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from attnserve_server.conversion.precision.quality import COSINE_FLOOR, COSINE_TARGET
from attnserve_server.conversion.verify.certify import ATTACK_SECONDS
from attnserve_server.engine.session import CPU
from attnserve_server.model.certificate import Batching, Certificate
from attnserve_server.model.manifest import BATCH
from attnserve_server.model.report import QualityReport

_STRICT: tuple[Batching, ...] = ("proved", "tested")
"""The policies that depend on the certificate."""
_RENEW = "`check --certify` writes a version with the new certificate"


@dataclass(frozen=True, slots=True)
class CheckRequest:
    """The bundle to check, and how.

    Attributes:
        path: the folder of the bundle.
        against: a source to compare with: an .onnx file, a Hugging Face folder, `package:NAME` or `zoo:NAME`; empty:
            none.
        certify: whether to write a new version with a fresh certificate, unless a finding failed.
        batching: the policy under which the bundle runs.
        attack_seconds: time limit of the attack on what is not proved.
        provider: the execution provider that golden answers are compared on. All else runs on the CPU.
    """

    path: Path
    against: str = ""
    certify: bool = False
    batching: Batching = "proved"
    attack_seconds: float = ATTACK_SECONDS
    provider: str = CPU


class Finding(BaseModel):
    """The result of one comparison. `passed` is None if there was nothing to compare; `detail` states why."""

    # An error is infinite if shapes differ or a run failed.
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")
    what: str
    passed: bool | None
    error: float | None = None
    allowed: float | None = None
    detail: str = ""

    @classmethod
    def of(cls, what: str, error: float, allowed: float, detail: str = "") -> Finding:
        """Return a finding that passes if `error` is at most `allowed`."""
        return cls(what=what, passed=bool(error <= allowed), error=error, allowed=allowed, detail=detail)


class CertifiedVersion(BaseModel):
    """A version that `check --certify` wrote, with one line for each clause of its certificate."""

    model_config = ConfigDict(frozen=True)
    version: str
    digest: str
    changes: tuple[str, ...]


class BundleCheck(BaseModel):
    """The result of a check.

    `quality`: the stored report of a reduced precision, or a new one if the check compared it with its source.
    `certified`: the version that was written; None without `--certify`, or if a finding failed.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")
    name: str
    version: str
    digest: str
    precision: str
    passed: bool
    findings: tuple[Finding, ...]
    quality: QualityReport | None = None
    certified: CertifiedVersion | None = None


def clause_findings(stored: Certificate | None, fresh: Certificate) -> Iterator[Finding]:
    """Yield a finding for each clause; it fails if the stored clause allows what the fresh one does not.

    Args:
        stored: the bundle's certificate; None if it has none, or if it is about to be replaced.
        fresh: made from the bundle's graph.

    Raises:
        KeyError: `stored` has no clause for an axis of `fresh`.
    """
    for clause in fresh.clauses:
        before = clause if stored is None else stored.clause(clause.axis)
        lost = any(before.allows(policy) and not clause.allows(policy) for policy in _STRICT)
        detail = f"{clause.status()}: {clause.reason}" if clause.reason else clause.status()
        yield Finding(
            what="batch neighbours" if clause.axis == BATCH else f"padding along {clause.axis}",
            passed=False if lost else True if clause.allows("proved") else None,
            error=clause.attack.worst if clause.attack else None,
            allowed=1.0 if clause.attack else None,
            detail=f"the stored certificate has {before.status()}, the graph is {detail}; {_RENEW}" if lost else detail,
        )


def quality_finding(quality: QualityReport) -> Finding:
    """Return a finding that fails below the floor of the mean cosine, and notes a value below its target."""
    short = quality.cosine_mean < COSINE_TARGET
    return Finding(
        what="quality",
        passed=quality.cosine_mean >= COSINE_FLOOR,
        error=1 - quality.cosine_mean,
        allowed=1 - COSINE_FLOOR,
        detail=f"mean cosine of {quality.output}{f' is below {COSINE_TARGET:g}' if short else ''}",
    )
