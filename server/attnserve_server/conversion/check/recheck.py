"""The check of a bundle repeated: its files, its answers, its axes and its weights, as anybody may ask at any time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from attnserve_server.conversion.assemble import Assembled, assemble
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.base.tolerances import CHECK_LENGTHS, Tolerances, row_sum_error
from attnserve_server.conversion.check.findings import BundleCheck, Finding
from attnserve_server.conversion.check.recertify import certificate_findings, write_certified
from attnserve_server.conversion.graphs.reading import read_graph
from attnserve_server.conversion.inputs.signature import Signature, signature_of
from attnserve_server.conversion.precision.quality import COSINE_FLOOR, COSINE_TARGET
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.rewrite.taps import ITEMS_PREFIX, WEIGHTS_PREFIX
from attnserve_server.conversion.verify.certify import ATTACK_SECONDS, certify
from attnserve_server.domain.values import Array
from attnserve_server.engine.golden import GoldenMismatch, read_golden, verify_golden
from attnserve_server.engine.session import LoadFailed, RuntimeSession
from attnserve_server.model.batching import NO_CERTIFICATE
from attnserve_server.model.certificate import Batching, Certificate
from attnserve_server.model.manifest import InputRole, Manifest
from attnserve_server.model.report import QualityReport
from attnserve_server.model.repository import MANIFEST_FILE, Bundle, BundleInvalid, Repository, verify


@dataclass(frozen=True, slots=True)
class Opened:
    """A bundle on the bench: its own graph opened for running, and that graph without taps, found and tapped anew.

    The bundle's manifest is the one that holds under the policy that is checked.
    """

    bundle: Bundle
    session: RuntimeSession
    runner: GraphRunner
    sampler: Sampler
    again: Assembled
    work: Path

    @property
    def manifest(self) -> Manifest:
        """Of the bundle."""
        return self.bundle.manifest

    @property
    def tolerances(self) -> Tolerances:
        """By the bundle's precision."""
        return Tolerances.of(self.manifest.precision)

    @property
    def bundled(self) -> Assembled:
        """The bundle's own tapped graph with its own sites, opened for a proof."""
        manifest = self.manifest
        return replace(
            self.again,
            model_path=self.bundle.model_path,
            checker=self.runner,
            sites=manifest.sites,
            outputs=manifest.outputs,
            site_axes={site.name: site.weight_axes for site in manifest.sites if site.available},
            derived_axes={axis.symbol: axis.derived for axis in manifest.axes if axis.derived is not None},
            precision=manifest.precision,
        )

    def mixed(self) -> tuple[dict[str, Array], list[dict[str, int]]]:
        """A batch of mixed lengths, as far as the model takes them, and each sequence's lengths on every axis."""
        symbols = self.sampler.signature.symbols
        longest = min((self.manifest.axis(symbol).max_length for symbol in symbols), default=max(CHECK_LENGTHS))
        rows = self.sampler.signature.fixed_batch or self.manifest.max_batch_size
        lengths = [min(length, longest) for length in CHECK_LENGTHS][-rows:]
        if not all(self.manifest.axis(symbol).paddable for symbol in symbols):
            lengths = [lengths[-1]] * len(lengths)
        feeds, each = self.sampler.mixed(lengths)
        return feeds, [{**self.manifest.fixed_lengths, **self.manifest.with_derived(own)} for own in each]


def bundle_at(path: Path) -> Bundle:
    """The bundle in a folder; its files are not verified.

    Raises:
        BuildRefused: there is none.
        BundleInvalid: its manifest is broken.
    """
    place = path.resolve()
    if not place.is_dir() or not (place / MANIFEST_FILE).is_file():
        raise BuildRefused(f"{path.name or place.name} is no bundle: it has no {MANIFEST_FILE}")
    return Repository(place.parents[1]).bundle(place.parent.name, place.name)


@dataclass(frozen=True, slots=True)
class CheckRequest:
    """What to check.

    Attributes:
        path: the bundle's folder.
        against: a source to compare with: an .onnx file, a Hugging Face folder, `package:NAME`, `zoo:NAME`; or empty.
        certify: whether to write a new version with a fresh certificate, unless the check fails.
        batching: the policy under which the bundle is run.
        attack_seconds: the most that trying to break what is not proved may take.
    """

    path: Path
    against: str = ""
    certify: bool = False
    batching: Batching = "proved"
    attack_seconds: float = ATTACK_SECONDS


def check_bundle(request: CheckRequest, steps: Steps | None = None) -> BundleCheck:
    """Repeat the check of a bundle; `steps` shows the progress.

    Raises:
        BuildRefused: there is no bundle, or the source cannot be read.
        BundleInvalid: the manifest is broken, or the disk refused the new version.
    """
    steps, against = steps or Steps.silent(), request.against
    stored = bundle_at(request.path)
    bundle = replace(stored, manifest=stored.manifest.under(request.batching))
    quality = bundle.manifest.check.quality
    certificate: Certificate | None = None
    with steps.shown(total=7), tempfile.TemporaryDirectory(prefix="attnserve-check-") as work:
        findings = list(_opening(bundle, steps))
        if all(finding.passed is not False for finding in findings):
            opened = _opened(bundle, Path(work), steps)
            certificate = _certified(opened, request, steps)
            if stored.manifest.certificate is None and not request.certify:
                findings.append(Finding(what="certificate", passed=None, detail=f"{NO_CERTIFICATE}: add --certify"))
            findings += certificate_findings(None if request.certify else stored.manifest.certificate, certificate)
            findings += _own(opened, steps)
            if against:
                from attnserve_server.conversion.check.source import compare_with_source  # noqa: PLC0415 - may bring torch

                more, quality = compare_with_source(opened, against, steps)
                findings += more
        if quality is not None:
            findings.append(_quality(quality))
    manifest = bundle.manifest
    passed = all(finding.passed is not False for finding in findings)
    written = None
    if request.certify and passed and certificate is not None:
        written = write_certified(stored, certificate, stored.path.parents[1], request.batching)
    return BundleCheck(
        name=manifest.name,
        version=manifest.version,
        digest=manifest.digest,
        precision=manifest.precision,
        passed=passed,
        findings=tuple(findings),
        quality=quality,
        certified=written,
    )


def _certified(opened: Opened, request: CheckRequest, steps: Steps) -> Certificate:
    """A fresh certificate of the bundle's own graph."""
    max_lengths = {symbol: opened.manifest.axis(symbol).max_length for symbol in opened.sampler.signature.symbols}
    return certify(
        opened.bundled,
        max_lengths,
        steps,
        batching=request.batching,
        attack_seconds=request.attack_seconds,
        max_batch_size=opened.manifest.max_batch_size,
    ).certificate


def _opening(bundle: Bundle, steps: Steps) -> Iterator[Finding]:
    """Files, load and golden answers; what comes after a failure is not tried."""
    steps.begin("verifying files")
    try:
        verify(bundle)
        golden = read_golden(bundle)
    except BundleInvalid as fault:
        yield Finding(what="files", passed=False, detail=fault.why)
        return
    yield Finding(what="files", passed=True, detail=f"{len(bundle.manifest.files)} as the manifest has them")
    steps.begin("asking for the golden answers")
    try:
        session = RuntimeSession.load(
            bundle.model_path, provider="CPUExecutionProvider", left_out=bundle.manifest.left_out
        )
    except LoadFailed as fault:
        yield Finding(what="golden answers", passed=False, detail=str(fault))
        return
    if not golden:
        yield Finding(
            what="golden answers", passed=None, detail="the bundle has none: it was made before there were any"
        )
        return
    try:
        worst = verify_golden(session, bundle.manifest, golden)
    except GoldenMismatch as fault:
        yield Finding(what="golden answers", passed=False, error=fault.error, allowed=fault.allowed, detail=fault.what)
        return
    yield Finding.of("golden answers", worst, 1.0, "in parts of what is allowed")


def _opened(bundle: Bundle, work: Path, steps: Steps) -> Opened:
    manifest = bundle.manifest
    proto = _untapped(read_graph(bundle.model_path))
    symbols = {extent: None for spec in manifest.inputs for extent in spec.shape if isinstance(extent, str)}
    signature = Signature(manifest.inputs, tuple(symbols), signature_of(proto.graph).fixed_batch)
    sizes = {spec.name: manifest.vocabulary_of(spec) for spec in manifest.inputs if spec.role is InputRole.TOKEN_IDS}
    sampler = Sampler(signature, vocabulary_sizes=sizes)
    session = RuntimeSession.load(bundle.model_path, provider="CPUExecutionProvider", left_out=bundle.manifest.left_out)
    place = work / "again"
    place.mkdir()
    steps.begin("finding attention anew")
    again = assemble(proto, sampler, place, Steps.silent())
    return Opened(bundle, session, GraphRunner(bundle.model_path), sampler, again, work)


def _untapped(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A bundle's graph as it was before its taps."""
    model = ir.from_proto(proto)
    graph = model.graph
    for values, prefix in ((graph.outputs, WEIGHTS_PREFIX), (graph.inputs, ITEMS_PREFIX)):
        if prefix == ITEMS_PREFIX:
            RemoveUnusedNodesPass()(model)
        for value in [value for value in values if str(value.name).startswith(prefix)]:
            values.remove(value)
    return ir.to_proto(model)


def _own(opened: Opened, steps: Steps) -> list[Finding]:
    """What a bundle says of its sites: that they are there, and that their weights make its outputs."""
    steps.begin("repeating the check")
    sites = sorted(site.name for site in opened.manifest.sites if site.available)
    return (
        _weights(opened, sites) if sites else [Finding(what="attention", passed=None, detail="no site gives weights")]
    )


def _weights(opened: Opened, names: list[str]) -> list[Finding]:
    """Sums of rows, and weights @ value beside each site's own output, with the bundle's own weights."""
    outputs = {site.name: str(site.weights_output) for site in opened.manifest.sites if site.available}
    lost = sorted(set(names) - set(opened.again.site_axes))
    if lost:
        return [Finding(what="attention", passed=False, detail=f"site {lost[0]} is not found in the graph")]
    feeds, _ = opened.mixed()
    found = opened.runner.run(feeds, list(outputs.values()))
    weights = {name: found[output] for name, output in outputs.items()}
    sums = [row_sum_error(own) for name, own in weights.items() if opened.again.found[name].rows_sum_to_one]
    errors = opened.again.product_errors(weights, feeds)
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    return [
        Finding.of("sums of attention rows", max(sums, default=0.0), opened.tolerances.row_sum),
        Finding.of("weights @ value", errors[worst], opened.tolerances.output, f"worst at {worst}"),
    ]


def _quality(quality: QualityReport) -> Finding:
    """The mean cosine, which may be below its target but not below the floor."""
    short = quality.cosine_mean < COSINE_TARGET
    return Finding(
        what="quality",
        passed=quality.cosine_mean >= COSINE_FLOOR,
        error=1 - quality.cosine_mean,
        allowed=1 - COSINE_FLOOR,
        detail=f"mean cosine of {quality.output}{f' is below {COSINE_TARGET:g}' if short else ''}",
    )
