"""What a repeated check found, as values that a person or a program can read."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from attnserve_server.model.report import QualityReport


class Finding(BaseModel):
    """One thing that was looked at. `passed` None: there was nothing to look at, and `detail` says why."""

    # An error may be infinite: shapes that differ, a run that failed.
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")
    what: str
    passed: bool | None
    error: float | None = None
    allowed: float | None = None
    detail: str = ""

    @classmethod
    def of(cls, what: str, error: float, allowed: float, detail: str = "") -> Finding:
        """Passed where the error is no more than what is allowed."""
        return cls(what=what, passed=bool(error <= allowed), error=error, allowed=allowed, detail=detail)


class CertifiedVersion(BaseModel):
    """A version that `check --certify` wrote, and in words what its certificate changes."""

    model_config = ConfigDict(frozen=True)
    version: str
    digest: str
    changes: tuple[str, ...]


class BundleCheck(BaseModel):
    """All that was found. `quality` is the report that a reduced precision was made with, or is made anew.

    `certified`: the version that was written; None where that was not asked for, or where the check failed.
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
