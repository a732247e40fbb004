"""Export: from a source model, of Hugging Face or of the zoo, to a bundle that was seen to answer like it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import onnx
import onnx_ir as ir

from attnserve_server.conversion.assemble import Assembled, axes_of
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.base.tolerances import CHECK_LENGTHS, Tolerances, judge
from attnserve_server.conversion.choose.comparing import Beside, tappable_sites, workloads
from attnserve_server.conversion.choose.fusion import Rewritten, fused
from attnserve_server.conversion.choose.trials import fastest, tried
from attnserve_server.conversion.graphs.reading import checked, precision_of, save
from attnserve_server.conversion.inputs.signature import SEQUENCE, Signature, signature_of
from attnserve_server.conversion.inputs.text import text_of, written_text
from attnserve_server.conversion.precision.calibration import ranges_of
from attnserve_server.conversion.precision.choose import Precision, in_precision
from attnserve_server.conversion.precision.quality import with_quality
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner, time_ratio
from attnserve_server.conversion.sources.source_model import (
    AUTO,
    DEFAULT_OPSETS,
    Grid,
    SourceModel,
    TellsMore,
    ZooOptions,
    graph_of,
    source_model,
)
from attnserve_server.conversion.verify.certify import ATTACK_SECONDS, certify
from attnserve_server.conversion.verify.compare import check_against_itself, differences
from attnserve_server.conversion.verify.golden import with_golden
from attnserve_server.conversion.verify.limits import as_the_server_warms_up, true_limits
from attnserve_server.model.certificate import Batching
from attnserve_server.model.manifest import AxisSpec, CheckReport, Manifest, Provenance
from attnserve_server.model.report import TrialReport
from attnserve_server.model.repository import MODEL_FILE, TOKENIZER_FILE, UNSEALED, Bundle, Repository, write_bundle
from attnserve_server.model.tokenizer import TextTokenizer

POOLINGS = ("", "mean")


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What to export. `version` empty: the next one. `pooling` "mean" adds the output `embedding`.

    `exporter` is `auto`, `dynamo` or `torchscript`; `opset` 0 is the exporter's own default. `zoo_options`: of a source
    that is of the zoo. `fuse`: try fused operators on packed heads, and keep them where that is faster. `try_more`: try
    the other exporter (where none is named) and the runtime's own rewritings, and keep what is faster. `batching`: the
    policy that warnings and checks are for. `attack_seconds`: the most that an attack on what is not proved may take.
    """

    source: str
    name: str
    repository: Path
    version: str = ""
    pooling: str = ""
    normalize: bool = False
    max_batch_size: int = 32
    expect_sha256: str = ""
    exporter: str = AUTO
    opset: int = 0
    zoo_options: ZooOptions = field(default_factory=ZooOptions)
    precision: Precision = "fp32"
    fuse: bool = True
    try_more: bool = False
    batching: Batching = "proved"
    attack_seconds: float = ATTACK_SECONDS


def export_bundle(request: ExportRequest, steps: Steps | None = None) -> Bundle:
    """Export a model and write its bundle, unless the check at the end finds a difference.

    Raises:
        TokenizerInvalid: the folder's tokenizer cannot be used.
        BuildRefused: the source is no model that can be exported; CheckFailed where the graph answers otherwise.
        BundleInvalid: there is such a version already, or the disk refused.
    """
    steps = steps or Steps.silent()
    if request.pooling not in POOLINGS:
        raise BuildRefused(f"pooling {request.pooling!r} is not known; 'mean' is")
    if request.normalize and not request.pooling:
        raise BuildRefused("normalising needs a pooled output: add --pooling mean")
    version = Repository(request.repository).free_version(request.name, request.version)
    total = 12 if request.try_more else 10
    with steps.shown(total), tempfile.TemporaryDirectory(prefix="attnserve-export-") as work:
        steps.begin("verifying the source")
        source = source_model(
            request.source,
            pooling=request.pooling,
            normalize=request.normalize,
            expect_sha256=request.expect_sha256,
            zoo_options=request.zoo_options,
            steps=steps,
        )
        return _export(replace(request, version=version), source, Path(work), steps)


def _export(  # noqa: PLR0915 - one step after another
    request: ExportRequest, source: SourceModel, work: Path, steps: Steps
) -> Bundle:
    if source.tokenizer_path is not None:
        TextTokenizer.load(source.tokenizer_path, SEQUENCE)
    steps.begin("exporting to ONNX")
    graph, exporter, opset = graph_of(source, request.exporter, request.opset, steps)
    proto = checked(graph, source.name)
    signature = signature_of(proto.graph, source.padding_id)
    more = source if isinstance(source, TellsMore) else None
    sampler = Sampler(signature, vocabulary_sizes=source.vocabulary_sizes)
    max_lengths = {symbol: source.max_lengths[symbol] for symbol in signature.symbols}
    text = text_of(signature.inputs, max_lengths, more.pair_start if more else None)
    reduced = proto
    if request.precision != "fp32":
        told = text if request.precision == "int8" else None
        ranges = ranges_of(proto, signature.inputs, told, source.tokenizer_path, work)
        reduced = checked(in_precision(proto, request.precision, ranges), source.name)
    steps.begin("fusing attention")
    traced = _Traced(proto, exporter, opset, fused(reduced, sampler, work, fuse=request.fuse))
    trials: tuple[TrialReport, ...] = ()
    if request.try_more and request.exporter == AUTO and request.precision == "fp32":
        steps.begin("trying other exporters")
        traced, trials = _other_exporters(request, source, traced, signature, sampler, work)
    assembled = traced.rewritten.assembled(sampler, work, steps)
    if not assembled.sites:
        raise BuildRefused(f"{source.architecture} exports without attention that is known, so there is nothing to tap")
    max_lengths, max_batch_size = true_limits(assembled, max_lengths, request.max_batch_size, steps, padding_known=True)
    text = text_of(signature.inputs, max_lengths, more.pair_start if more else None)
    certified = certify(
        assembled,
        max_lengths,
        steps,
        batching=request.batching,
        attack_seconds=request.attack_seconds,
        max_batch_size=max_batch_size,
    )
    certificate = certified.certificate
    axes = tuple(
        _gridded(axis, more.grids if more else {})
        for axis in axes_of(assembled, max_lengths, certificate, request.batching)
    )
    steps.begin("checking against the source")
    if assembled.precision == "int8":
        # Rounding to eight bits is no matter of a tolerance for each number; what it costs is told as quality.
        paddable = all(axis.paddable or axis.fixed for axis in axes)
        report = check_against_itself(assembled, max_lengths, max_batch_size, paddable=paddable)
    else:
        report = _check(assembled, source, max_lengths, max_batch_size)
    judge(report, assembled.tolerances.row_sum)
    left_out = None
    if request.try_more:
        left_out, more_trials = fastest(assembled, work, steps)
        trials += more_trials
    report = report.model_copy(update={"fusion": traced.rewritten.report, "trials": trials})
    steps.begin("writing the bundle")
    files = {MODEL_FILE: assembled.model_path}
    if source.tokenizer_path is not None:
        files[TOKENIZER_FILE] = source.tokenizer_path
        text = written_text(source.tokenizer_path, text, signature.inputs, axes, steps)
    manifest = Manifest(
        name=request.name,
        version=request.version,
        digest=UNSEALED,
        files={},
        precision=assembled.precision,
        max_batch_size=max_batch_size,
        axes=axes,
        inputs=signature.inputs,
        outputs=assembled.outputs,
        sites=certified.sites,
        vocabulary_size=max(source.vocabulary_sizes.values(), default=0),
        text=text if source.tokenizer_path is not None else None,
        left_out=left_out,
        provenance=Provenance(
            source=source.name,
            source_sha256=source.sha256,
            exporter=f"torch.onnx.export, {traced.exporter}",
            opset=traced.opset,
            created=now(),
            versions=dict(source.versions),
        ),
        check=report,
        certificate=certificate,
    )
    if reduced is not proto:
        manifest = with_quality(
            manifest, assembled.model_path, proto, sampler, source.tokenizer_path, work, steps, request.batching
        )
    manifest, session = as_the_server_warms_up(manifest, assembled.model_path, steps)
    manifest, golden = with_golden(manifest, session, sampler, work, steps, request.batching)
    return write_bundle(request.repository, manifest, {**files, **golden})


@dataclass(frozen=True, slots=True)
class _Traced:
    """A graph as an exporter made it, and what fusing came to."""

    proto: onnx.ModelProto
    exporter: str
    opset: int
    rewritten: Rewritten


def _other_exporters(
    request: ExportRequest,
    source: SourceModel,
    first: _Traced,
    signature: Signature,
    sampler: Sampler,
    work: Path,
) -> tuple[_Traced, tuple[TrialReport, ...]]:
    """The first exporter's graph, or that of another which answers alike and is faster; and what came of each."""
    path = work / "first.onnx"
    save(ir.from_proto(first.rewritten.proto), path)
    base, outputs = GraphRunner(path), [value.name for value in first.proto.graph.output]
    tolerance = Tolerances.of(precision_of(first.proto)).output
    beside = Beside(base, workloads(base, sampler, outputs), outputs, tolerance)
    trials: list[TrialReport] = []
    for exporter in list(DEFAULT_OPSETS)[list(DEFAULT_OPSETS).index(first.exporter) + 1 :]:
        opset = request.opset or DEFAULT_OPSETS[exporter]
        what = f"{exporter} at opset {opset}, beside {first.exporter}"
        try:
            proto = checked(source.to_graph(exporter, opset), source.name)
            if signature_of(proto.graph, source.padding_id) != signature:
                trials.append(TrialReport(what=what, reason="its inputs are others"))
                continue
            folder = work / exporter
            folder.mkdir()
            rewritten = fused(proto, sampler, folder, fuse=request.fuse)
            if tappable_sites(rewritten.proto) < tappable_sites(first.rewritten.proto):
                trials.append(TrialReport(what=what, reason="fewer of its sites can be tapped"))
                continue
            save(ir.from_proto(rewritten.proto), folder / "other.onnx")
            trials.append(tried(what, GraphRunner(folder / "other.onnx"), beside))
        except BuildRefused as fault:
            trials.append(TrialReport(what=what, reason=str(fault)))
            continue
        if trials[-1].kept:
            return _Traced(proto, exporter, opset, rewritten), tuple(trials)
    return first, tuple(trials)


def _gridded(axis: AxisSpec, grids: Mapping[int, Grid]) -> AxisSpec:
    """A fixed axis with its patch grid, where the source knows one of its length."""
    if not axis.fixed or axis.grid or axis.max_length not in grids:
        return axis
    grid = grids[axis.max_length]
    told = {"grid": (grid.rows, grid.columns), "leading": grid.leading}
    return AxisSpec.model_validate({**axis.model_dump(), **told})


def _check(assembled: Assembled, source: SourceModel, max_lengths: Mapping[str, int], rows: int) -> CheckReport:
    """Compare the tapped graph with the source's own answers, on mixed lengths in one padded batch of at most `rows`.

    Where rows change each other's answers, the source's change alike.
    """
    tapped = GraphRunner(assembled.model_path)
    longest = min(max_lengths.values(), default=max(CHECK_LENGTHS))
    mixed = tuple(min(length, longest) for length in (CHECK_LENGTHS[-rows:] if rows > 1 else CHECK_LENGTHS))
    feeds, lengths = assembled.sampler.mixed(mixed)
    outputs = [spec.name for spec in assembled.outputs]
    found = tapped.run(feeds, [*outputs, *assembled.weights.values()])
    named = [_lengths(assembled, own) for own in lengths]
    seen = differences(assembled.outputs, assembled.sites, found, source.reference(feeds), named)
    return CheckReport(
        against=f"{source.architecture} in torch, eager attention",
        lengths=mixed,
        output_max_abs_error=seen.output,
        output_tolerance=assembled.tolerances.output,
        weight_max_abs_error=seen.weight,
        weight_tolerance=assembled.tolerances.weight,
        row_sum_max_abs_error=seen.row_sum,
        tapped_over_source_time=time_ratio(tapped, assembled.source, feeds, outputs),
    )


def _lengths(assembled: Assembled, own: Mapping[str, int]) -> dict[str, int]:
    """Lengths of all axes that a sequence has: its own, those derived from them, and the fixed ones."""
    derived = {symbol: form.of(own[form.source]) for symbol, form in assembled.derived_axes.items()}
    return {**assembled.fixed_axes, **own, **derived}


def now() -> str:
    """The wall time, for provenance alone, as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")  # noqa: TID251 - provenance
