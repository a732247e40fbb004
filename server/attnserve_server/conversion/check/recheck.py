"""Repeat the check of a bundle: files, golden answers, certificate, weights, and optionally its source's answers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from attnserve_server.conversion.base.steps import Step, Steps
from attnserve_server.conversion.base.tolerances import row_sum_error
from attnserve_server.conversion.check.opened import (
    BundleCheck,
    CertifiedVersion,
    Finding,
    Opened,
    bundle_at,
    opened,
)
from attnserve_server.conversion.check.source import compare_with_source
from attnserve_server.conversion.precision.quality import COSINE_FLOOR, COSINE_TARGET
from attnserve_server.conversion.verify.certify import ATTACK_SECONDS, certify
from attnserve_server.engine.golden import GoldenMismatch, read_golden, verify_golden
from attnserve_server.engine.session import LoadFailed, RuntimeSession
from attnserve_server.model.batching import NO_CERTIFICATE
from attnserve_server.model.certificate import Batching, Certificate, Clause
from attnserve_server.model.manifest import BATCH
from attnserve_server.model.report import QualityReport
from attnserve_server.model.repository import Bundle, BundleInvalid, Repository, verify, write_bundle

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
    """

    path: Path
    against: str = ""
    certify: bool = False
    batching: Batching = "proved"
    attack_seconds: float = ATTACK_SECONDS


def check_bundle(request: CheckRequest, steps: Steps | None = None) -> BundleCheck:
    """Repeat the check of a bundle. After a failure of its files or golden answers, the rest is skipped.

    Args:
        request: the bundle, and how to check it.
        steps: shows progress and warnings; None: silent.

    Raises:
        BuildRefused: the folder has no manifest, or the source cannot be read.
        BundleInvalid: the manifest is broken, or the new version cannot be written.
    """
    steps = steps or Steps.silent()
    stored = bundle_at(request.path)
    plan = _steps_of(request)
    with steps.shown(len(plan)), tempfile.TemporaryDirectory(prefix="attnserve-check-") as work:
        check = _Check(request, stored, Path(work), steps)
        for step in plan:
            if check.unusable:
                break
            steps.begin(step.title)
            step.run(check)
    if check.quality is not None:
        check.findings.append(_quality(check.quality))
    manifest = stored.manifest
    certified = None
    if request.certify and check.passed and check.certificate is not None:
        certified = _write_certified(stored, check.certificate, request.batching)
    return BundleCheck(
        name=manifest.name,
        version=manifest.version,
        digest=manifest.digest,
        precision=manifest.precision,
        passed=check.passed,
        findings=tuple(check.findings),
        quality=check.quality,
        certified=certified,
    )


class _Check:
    """The state of one check. Each step adds its findings; `opened` is set by the step `open`."""

    opened: Opened

    def __init__(self, request: CheckRequest, stored: Bundle, work: Path, steps: Steps) -> None:
        self.request, self.stored, self.work, self.steps = request, stored, work, steps
        self.bundle = replace(stored, manifest=stored.manifest.under(request.batching))
        self.quality: QualityReport | None = stored.manifest.check.quality
        self.certificate: Certificate | None = None
        self.findings: list[Finding] = []
        self.unusable = False

    @property
    def passed(self) -> bool:
        """Whether no finding failed so far."""
        return all(finding.passed is not False for finding in self.findings)

    def verify_files(self) -> None:
        """Compare every file with its digest, and read the golden answers."""
        try:
            verify(self.bundle)
            read_golden(self.bundle)
        except BundleInvalid as fault:
            self._fail(Finding(what="files", passed=False, detail=fault.why))
            return
        count = len(self.bundle.manifest.files)
        self.findings.append(Finding(what="files", passed=True, detail=f"{count} with the digests of the manifest"))

    def compare_golden(self) -> None:
        """Load the graph as the server does, and compare its answers with the golden ones."""
        bundle, what = self.bundle, "golden answers"
        try:
            session = RuntimeSession.load(
                bundle.model_path, provider="CPUExecutionProvider", left_out=bundle.manifest.left_out
            )
        except LoadFailed as fault:
            self._fail(Finding(what=what, passed=False, detail=str(fault)))
            return
        golden = read_golden(bundle)
        if not golden:
            detail = "the bundle has none: an older release wrote it"
            self.findings.append(Finding(what=what, passed=None, detail=detail))
            return
        try:
            worst = verify_golden(session, bundle.manifest, golden)
        except GoldenMismatch as fault:
            self._fail(Finding(what=what, passed=False, error=fault.error, allowed=fault.allowed, detail=fault.what))
            return
        self.findings.append(Finding.of(what, worst, 1.0, "relative to what is allowed"))

    def open(self) -> None:
        """Load the graph for runs of the check, and search it for attention again."""
        self.opened = opened(self.bundle, self.work)

    def certify(self) -> None:
        """Make a fresh certificate, and compare the stored one with it."""
        bundle, request = self.opened, self.request
        symbols = bundle.sampler.signature.symbols
        self.certificate = certify(
            bundle.bundled,
            {symbol: bundle.manifest.axis(symbol).max_length for symbol in symbols},
            self.steps,
            batching=request.batching,
            attack_seconds=request.attack_seconds,
            max_batch_size=bundle.manifest.max_batch_size,
        ).certificate
        stored = self.stored.manifest.certificate
        if stored is None and not request.certify:
            detail = f"{NO_CERTIFICATE}: add --certify"
            self.findings.append(Finding(what="certificate", passed=None, detail=detail))
        self.findings += _of_certificate(None if request.certify else stored, self.certificate)

    def compare_weights(self) -> None:
        """Check the sums of attention rows, and weights @ value against each site's own output."""
        bundle = self.opened
        outputs = {site.name: str(site.weights_output) for site in bundle.manifest.sites if site.available}
        if not outputs:
            self.findings.append(Finding(what="attention", passed=None, detail="no site gives weights"))
            return
        lost = sorted(set(outputs) - set(bundle.again.site_axes))
        if lost:
            detail = f"site {lost[0]} is not found in the graph"
            self.findings.append(Finding(what="attention", passed=False, detail=detail))
            return
        feeds, _ = bundle.mixed()
        found = bundle.runner.run(feeds, list(outputs.values()))
        weights = {name: found[output] for name, output in outputs.items()}
        sums = [row_sum_error(own) for name, own in weights.items() if bundle.again.found[name].rows_sum_to_one]
        errors = bundle.again.product_errors(weights, feeds)
        worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
        self.findings += [
            Finding.of("sums of attention rows", max(sums, default=0.0), bundle.tolerances.row_sum),
            Finding.of("weights @ value", errors[worst], bundle.tolerances.output, f"worst at {worst}"),
        ]

    def compare_source(self) -> None:
        """Compare outputs and weights with those of the source; in int8, measure the quality again."""
        more, self.quality = compare_with_source(self.opened, self.request.against, self.steps)
        self.findings += more

    def _fail(self, finding: Finding) -> None:
        """Add a failed finding after which the bundle cannot be checked further."""
        self.findings.append(finding)
        self.unusable = True


def _steps_of(request: CheckRequest) -> tuple[Step[_Check], ...]:
    """Return the steps of a check, in order."""
    every = (
        (True, Step("files", "verifying files", _Check.verify_files)),
        (True, Step("golden", "comparing golden answers", _Check.compare_golden)),
        (True, Step("open", "finding attention again", _Check.open)),
        (True, Step("certify", "proving that batches are safe", _Check.certify)),
        (True, Step("weights", "checking weights", _Check.compare_weights)),
        (
            bool(request.against),
            Step("source", f"comparing with {Path(request.against).name}", _Check.compare_source),
        ),
    )
    return tuple(step for applies, step in every if applies)


def _of_certificate(stored: Certificate | None, fresh: Certificate) -> Iterator[Finding]:
    """Yield a finding for each clause; it fails if the stored clause allows what the fresh one does not.

    Args:
        stored: the bundle's certificate; None if it has none, or if it is about to be replaced.
        fresh: made from the bundle's graph.
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


def _write_certified(stored: Bundle, fresh: Certificate, batching: Batching) -> CertifiedVersion:
    """Write the bundle with its fresh certificate as a new version, and list what the certificate changes.

    Args:
        stored: the bundle, whose files are verified.
        fresh: made from the bundle's graph.
        batching: the policy that decides the stored `paddable` of each axis.

    Raises:
        BundleInvalid: the version cannot be written.
    """
    old, root = stored.manifest, stored.path.parents[1]
    version = Repository(root).free_version(old.name)
    made = old.model_copy(update={"format": 2, "version": version, "certificate": fresh})
    made = made.model_copy(update={"axes": made.under(batching).axes})
    written = write_bundle(root, made, {name: stored.path / name for name in old.files})
    changes = tuple(_change(old.certificate, clause) for clause in fresh.clauses)
    return CertifiedVersion(version=version, digest=written.manifest.digest, changes=changes)


def _change(before: Certificate | None, clause: Clause) -> str:
    what = "batch" if clause.axis == BATCH else f"padding along {clause.axis}"
    was = "no certificate" if before is None else before.clause(clause.axis).status()
    why = f" ({clause.reason})" if clause.reason else ""
    return f"{what}: {was} -> {clause.status()}{why}"


def _quality(quality: QualityReport) -> Finding:
    """Return a finding that fails below the floor of the mean cosine, and notes a value below its target."""
    short = quality.cosine_mean < COSINE_TARGET
    return Finding(
        what="quality",
        passed=quality.cosine_mean >= COSINE_FLOOR,
        error=1 - quality.cosine_mean,
        allowed=1 - COSINE_FLOOR,
        detail=f"mean cosine of {quality.output}{f' is below {COSINE_TARGET:g}' if short else ''}",
    )
