"""Repeat the check of a bundle: files, golden answers, certificate, weights, and optionally its source's answers.

A bundle is the folder of a converted model. Its golden answers are those that the conversion recorded, and its
certificate states whether a batch or padding can change an answer.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from attnserve_server.conversion.base.steps import Step, Steps
from attnserve_server.conversion.check.comparisons import Check
from attnserve_server.conversion.check.findings import BundleCheck, CertifiedVersion, CheckRequest, quality_finding
from attnserve_server.conversion.check.opened import bundle_at
from attnserve_server.model.certificate import Batching, Certificate, Clause
from attnserve_server.model.manifest import BATCH
from attnserve_server.model.repository import Bundle, Repository, write_bundle


def check_bundle(request: CheckRequest, steps: Steps | None = None) -> BundleCheck:
    """Repeat the check of a bundle. After a failure of its files or golden answers, the rest is skipped.

    Args:
        request: the bundle, and how to check it.
        steps: shows progress and warnings; None: silent.

    Raises:
        BuildRefused: the folder has no manifest, or the graph or the source cannot be read or run.
        BundleInvalid: the manifest is broken, or the new version cannot be written.
    """
    steps = steps or Steps.silent()
    stored = bundle_at(request.path)
    plan = _steps_of(request)
    with steps.shown(len(plan)), tempfile.TemporaryDirectory(prefix="attnserve-check-") as work:
        check = Check(request, stored, Path(work), steps)
        for step in plan:
            if check.unusable:
                break
            steps.begin(step.title)
            step.run(check)
    if check.quality is not None:
        check.findings.append(quality_finding(check.quality))
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


def _steps_of(request: CheckRequest) -> tuple[Step[Check], ...]:
    """Return the steps of a check, in order."""
    every = (
        (True, Step("files", "verifying files", Check.verify_files)),
        (True, Step("golden", "comparing golden answers", Check.compare_golden)),
        (True, Step("open", "finding attention again", Check.open)),
        (True, Step("certify", "proving that batches are safe", Check.certify)),
        (True, Step("weights", "checking weights", Check.compare_weights)),
        (
            bool(request.against),
            Step("source", f"comparing with {Path(request.against).name}", Check.compare_source),
        ),
    )
    return tuple(step for applies, step in every if applies)


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
