"""The steps of a check: each compares one part of a bundle, the folder of a converted model, and adds its findings.

A difference is a failed finding. A step raises BuildRefused where a graph or the source cannot be read or run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.base.tolerances import max_abs, row_sum_error
from attnserve_server.conversion.check.findings import CheckRequest, Finding, clause_findings
from attnserve_server.conversion.check.opened import Opened, opened
from attnserve_server.conversion.check.source import compare_with_source
from attnserve_server.conversion.verify.certify import certify
from attnserve_server.engine.golden import GoldenMismatch, read_golden, verify_golden
from attnserve_server.engine.session import LoadFailed, RuntimeSession
from attnserve_server.model.batching import NO_CERTIFICATE
from attnserve_server.model.certificate import Certificate
from attnserve_server.model.equality import FLOORS
from attnserve_server.model.holding import verify
from attnserve_server.model.report import QualityReport
from attnserve_server.model.repository import Bundle, BundleInvalid


class Check:
    """The state of one check. Each step adds its findings.

    `open` sets `opened`, which the steps after it read. `unusable` is set by a failure after which no step can run.
    """

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
                bundle.model_path, provider=self.request.provider, left_out=bundle.manifest.left_out
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
            detail = f"{fault.what} on {fault.provider}"
            self._fail(Finding(what=what, passed=False, error=fault.error, allowed=fault.allowed, detail=detail))
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
        self.findings += clause_findings(None if request.certify else stored, self.certificate)

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
        joined = {site.name: site.mean_output for site in bundle.manifest.sites if site.mean_output is not None}
        found = bundle.runner.run(feeds, [*outputs.values(), *joined.values()])
        weights = {name: found[output] for name, output in outputs.items()}
        sums = [row_sum_error(own) for name, own in weights.items() if bundle.again.found[name].rows_sum_to_one]
        errors = bundle.again.product_errors(weights, feeds)
        worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
        self.findings += [
            Finding.of("sums of attention rows", max(sums, default=0.0), bundle.tolerances.row_sum),
            Finding.of("weights @ value", errors[worst], bundle.tolerances.output, f"worst at {worst}"),
        ]
        if joined:
            means = (max_abs(found[mean], weights[name].mean(axis=1)) for name, mean in joined.items())
            self.findings.append(Finding.of("means over heads", max(means), FLOORS["fp32"][1], "from the weights"))

    def compare_source(self) -> None:
        """Compare outputs and weights with those of the source; in int8, measure the quality again."""
        more, self.quality = compare_with_source(self.opened, self.request.against, self.steps)
        self.findings += more

    def _fail(self, finding: Finding) -> None:
        """Add a failed finding after which the bundle cannot be checked further."""
        self.findings.append(finding)
        self.unusable = True
