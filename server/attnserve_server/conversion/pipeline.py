"""The steps of a conversion, from a source's graph to a written bundle, in one list that every source shares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import onnx

from attnserve_server.conversion.assemble import Assembled, axes_of, with_grid
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Step, Steps
from attnserve_server.conversion.base.tolerances import judge
from attnserve_server.conversion.caches.finding import is_named_present
from attnserve_server.conversion.choose.fusion import Rewritten, fused
from attnserve_server.conversion.choose.trials import check_on_target, faster_export, fastest
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.graphs.sharing import WEIGHTS_FILE, share_weights
from attnserve_server.conversion.inputs.signature import in_float16
from attnserve_server.conversion.inputs.text import text_of, written_text
from attnserve_server.conversion.learning.inputs import with_needed_keys
from attnserve_server.conversion.precision.calibration import ranges_of
from attnserve_server.conversion.precision.choose import Precision, in_precision
from attnserve_server.conversion.precision.per_row import Scheme, with_scale_per_row
from attnserve_server.conversion.precision.quality import with_quality
from attnserve_server.conversion.precision.reference_features import with_reference_features
from attnserve_server.conversion.sources.source import Source, SourceGraph
from attnserve_server.conversion.verify.certify import ATTACK_SECONDS, Certified, certify, refuse_swapped_axes
from attnserve_server.conversion.verify.compare import check_against_itself, check_against_source
from attnserve_server.conversion.verify.continuing import Continuing, continuing_of
from attnserve_server.conversion.verify.golden import with_golden
from attnserve_server.conversion.verify.limits import as_the_server_warms_up, reasons_of, true_limits
from attnserve_server.engine.providers import CPU
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.certificate import Batching
from attnserve_server.model.heads import HeadSpec
from attnserve_server.model.manifest import AxisSpec, Manifest, OutputSpec, Provenance, TextSpec
from attnserve_server.model.past import PAST_FILE
from attnserve_server.model.report import CheckReport, RequantizeReport, TrialReport
from attnserve_server.model.repository import MODEL_FILE, TOKENIZER_FILE, UNSEALED, Bundle, write_bundle

_CALIBRATION_TOKENS = 128
"""Length of calibration texts for a file, whose greatest length is not known before it is run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Name and version of a bundle, and the choices of its conversion.

    Attributes:
        name: the model's name.
        repository: the folder of all models.
        version: a positive integer; empty: one more than the highest existing version.
        max_batch_size: the most sequences in one batch. The graph may turn out to support fewer.
        precision: fp32 keeps the source's own precision.
        requantize: "per-row" gives dynamic quantizers one scale for each row; None keeps them.
        fuse: whether to try fused attention operators, and keep them if they are faster.
        try_more: whether to try other exporters and the runtime's rewritings, and keep what is faster.
        require_attention: whether to refuse a model if no attention site gives weights.
        target: the execution provider on which alternatives are tried.
        batching: the policy that warnings and checks assume.
        attack_seconds: time limit of the attack on what is not proved.
        reference_texts: on which row features are measured, for comparison when it serves; empty: English sentences.
    """

    name: str
    repository: Path
    version: str = ""
    max_batch_size: int = 32
    precision: Precision = "fp32"
    requantize: Scheme | None = None
    fuse: bool = True
    try_more: bool = False
    require_attention: bool = False
    target: str = CPU
    batching: Batching = "proved"
    attack_seconds: float = ATTACK_SECONDS
    reference_texts: tuple[str, ...] = ()


class Conversion:
    """The state of one conversion. Each step reads what earlier steps found, and adds its own results.

    Attributes of optional steps have defaults; the step named beside each other one sets it. Steps raise BuildRefused.
    """

    assembled: Assembled  # assemble
    bounds: dict[str, str]  # limit
    certified: Certified  # certify
    axes: tuple[AxisSpec, ...]  # certify
    report: CheckReport  # check
    manifest: Manifest  # describe
    session: RuntimeSession  # warm_up
    bundle: Bundle  # write

    def __init__(self, source: SourceGraph, options: Options, work: Path, steps: Steps) -> None:
        work.mkdir()
        self.source, self.options, self.work, self.steps = source, options, work, steps
        self.sampler, self.exporter, self.opset = source.sampler, source.exporter, source.opset
        self.max_lengths = dict(source.max_lengths)
        self.max_batch_size = source.signature.fixed_batch or options.max_batch_size
        self.reduced: onnx.ModelProto = source.proto
        self.requantized: RequantizeReport | None = None
        self.rewritten = Rewritten(source.proto)
        self.trials: tuple[TrialReport, ...] = ()
        self.left_out: tuple[str, ...] | None = None
        self.files: dict[str, Path] = {}
        self.continuing: Continuing | None = None

    def reduce(self) -> None:
        """Requantize the graph, and convert it to the requested precision. Raises BuildRefused if it cannot be."""
        source, options = self.source, self.options
        if options.requantize:
            proto, report = with_scale_per_row(source.proto)
            if report.left:
                self.steps.warn(f"{report}; these quantizers keep one scale for the whole batch")
            self.reduced, self.requantized = checked(proto, source.name), report
        if options.precision == "fp16":
            self.sampler = replace(self.sampler, signature=in_float16(source.signature))
        if options.precision != "fp32":
            text = self._calibration_text() if options.precision == "int8" else None
            ranges = ranges_of(source.proto, source.signature.inputs, text, source.tokenizer, self.work)
            self.reduced = checked(in_precision(self.reduced, options.precision, ranges), source.name)
        self.rewritten = Rewritten(self.reduced)

    def fuse(self) -> None:
        """Fuse attention, if that gives the same answers and is faster."""
        self.rewritten = fused(self.reduced, self.sampler, self.work, provider=self.options.target)

    def try_exporters(self) -> None:
        """Replace the graph by another exporter's, if that gives the same answers and is faster."""
        how, others = self.options, self.source.others
        kept, self.rewritten, self.trials = faster_export(
            self.rewritten, others, self.sampler, self.work, fuse=how.fuse, provider=how.target
        )
        if kept is not None:
            self.exporter, self.opset = kept.exporter, kept.opset

    def assemble(self) -> None:
        """Find the attention sites, tap them, and learn the axes of outputs and weights by running the graph.

        Raises:
            BuildRefused: the graph has no attention, and the source is a torch model or requires attention; or the
                target gives other answers than the CPU.
        """
        self.assembled = self.rewritten.assembled(self.sampler, self.work, self.steps)
        name, sites = self.source.name, self.assembled.sites
        if not sites and self.source.model is not None:
            raise BuildRefused(f"{self.source.model.architecture} exports without attention that can be recognised")
        if self.options.require_attention and not self.assembled.site_axes:
            raise BuildRefused(f"{name} has no attention site that gives weights, which --require-attention demands")
        if not sites:
            self.steps.warn(f"{name} has no attention that can be recognised: it is served without weights")
        check_on_target(self.assembled, self.options.target, self.steps)

    def limit(self) -> None:
        """Lower the greatest lengths and the greatest batch to those that the graph runs on."""
        self.max_lengths, self.max_batch_size = true_limits(
            self.assembled, self.max_lengths, self.max_batch_size, self.steps, padding_known=self.source.traced
        )
        self.bounds = reasons_of(self.source.bounds, self.source.max_lengths, self.max_lengths, self.steps)

    def certify(self) -> None:
        """Prove or attack what batching can change, and set what the policy allows along each axis.

        Raises:
            BuildRefused: the batch of a file is its second axis.
        """
        options = self.options
        self.certified = certify(
            self.assembled,
            self.max_lengths,
            self.steps,
            batching=options.batching,
            attack_seconds=options.attack_seconds,
            max_batch_size=self.max_batch_size,
        )
        certificate = self.certified.certificate
        if not self.source.traced:
            refuse_swapped_axes(self.assembled, certificate, self.source.proto.graph, self.steps)
        axes = axes_of(self.assembled, self.max_lengths, certificate, options.batching, self.bounds)
        self.axes = tuple(with_grid(axis, self.source.grids.get(axis.max_length)) for axis in axes)

    def check(self) -> None:
        """Compare the tapped graph with its source.

        A file, and a model in int8, are compared with the untapped graph, and weights @ value with each site's output.
        Rounding to int8 has no tolerance for single numbers; its cost is reported as quality.

        Raises:
            CheckFailed: a difference exceeds its tolerance.
        """
        assembled, model = self.assembled, self.source.model
        if model is None or assembled.precision == "int8":
            paddable = all(axis.paddable or axis.fixed for axis in self.axes)
            report = check_against_itself(assembled, self.max_lengths, self.max_batch_size, paddable=paddable)
        else:
            report = check_against_source(
                assembled, model.reference, model.architecture, self.max_lengths, self.max_batch_size
            )
        judge(report, assembled.tolerances.row_sum)
        self.report = report

    def try_rewritings(self) -> None:
        """Choose the runtime's optimizers that make the tapped graph fastest."""
        self.left_out, trials = fastest(self.assembled, self.work)
        self.trials += trials

    def describe(self) -> None:
        """Write the manifest, with everything that is known so far."""
        source, options, assembled = self.source, self.options, self.assembled
        reports = {"fusion": self.rewritten.report, "trials": self.trials, "requantize": self.requantized}
        self.files[MODEL_FILE] = assembled.model_path
        if source.tokenizer is not None:
            self.files[TOKENIZER_FILE] = source.tokenizer
        self.manifest = Manifest(
            name=options.name,
            version=options.version,
            digest=UNSEALED,
            files={},
            precision=assembled.precision,
            max_batch_size=self.max_batch_size,
            axes=self.axes,
            inputs=with_needed_keys(assembled.source, self.sampler, [spec.name for spec in assembled.outputs]),
            outputs=self._outputs(),
            sites=self.certified.sites,
            vocabulary_size=source.vocabulary_size,
            text=self._text(),
            head=self._head(),
            embedding=source.task.embedding,
            left_out=self.left_out,
            provenance=Provenance(
                source=source.name,
                source_sha256=source.sha256,
                exporter=self.exporter,
                opset=self.opset,
                created=datetime.now(UTC).isoformat(timespec="seconds"),  # noqa: TID251 - wall time, for provenance only
                versions=dict(source.versions),
                solved=source.facts,
                target=options.target,
            ),
            check=self.report.model_copy(update=reports),
            certificate=self.certified.certificate,
        )

    def measure_quality(self) -> None:
        """Compare the answers in the reduced precision with those of the source's own precision.

        Raises:
            CheckFailed: the answers differ too much for the same model.
        """
        if self.reduced is self.source.proto:
            return  # the source has this precision already
        graphs = self.manifest, self.assembled.model_path, self.source.proto, self.sampler
        how = self.source.tokenizer, self.work, self.steps, self.options.batching
        self.manifest = with_quality(*graphs, *how, alone=self.requantized is not None)

    def warm_up(self) -> None:
        """Run every shape of the server's warm-up, and lower the greatest batch if one fails."""
        self.manifest, self.session = as_the_server_warms_up(self.manifest, self.assembled.model_path, self.steps)

    def continue_past(self) -> None:
        """Add the graph of sequences with a past, if the source is a decoder with a cache."""
        decoder = self.source.decoder
        if decoder is None:
            return
        if self.reduced is not self.source.proto:
            self.steps.warn("sequences cannot have a past: the graph for them keeps the source's precision")
            return
        path, sampler = self.assembled.model_path, self.sampler
        self.continuing = continuing_of(decoder, self.manifest, path, sampler, self.work, self.steps)
        if self.continuing is not None:
            self.manifest = self.manifest.model_copy(update={"past": self.continuing.past})
            self.files[PAST_FILE] = self.continuing.path

    def make_golden(self) -> None:
        """Record the answers of the finished graph to a few sequences, and its row features on sentences."""
        made_with = (self.manifest, self.session, self.sampler, self.work, self.steps, self.options.batching)
        described, golden = with_golden(*made_with, continuing=self.continuing)
        self.files.update(golden)
        how = self.source.tokenizer, self.options.batching, self.options.reference_texts
        self.manifest = with_reference_features(described, self.session, *how)

    def write(self) -> None:
        """Write the bundle; graphs share their weights. Raises BundleInvalid if the disk refuses."""
        if PAST_FILE in self.files:
            weights = share_weights(self.files[MODEL_FILE], self.files[PAST_FILE])
            self.files |= {} if weights is None else {WEIGHTS_FILE: weights}
        self.bundle = write_bundle(self.options.repository, self.manifest, self.files)

    def _calibration_text(self) -> TextSpec | None:
        lengths = self.max_lengths
        if not self.source.traced:
            lengths = {symbol: min(length, _CALIBRATION_TOKENS) for symbol, length in lengths.items()}
        return text_of(self.source.signature.inputs, lengths, self.source.pair_start)

    def _outputs(self) -> tuple[OutputSpec, ...]:
        """Return the outputs; some, such as those that continue a cache, are returned to requests that name them."""
        decoder, outputs = self.source.decoder, self.assembled.outputs
        named = self.source.task.on_request.union(() if decoder is None else decoder.cache.presents)
        named |= {spec.name for spec in outputs if is_named_present(spec.name)}
        if self._head() is None and named.issuperset(spec.name for spec in outputs):
            return outputs
        return tuple(spec.model_copy(update={"on_request": spec.name in named}) for spec in outputs)

    def _text(self) -> TextSpec | None:
        """Return how text fills the inputs; None if clients cannot send text."""
        if (source := self.source).tokenizer is None:
            return None
        text = text_of(source.signature.inputs, self.max_lengths, source.pair_start)
        written = written_text(source.tokenizer, text, source.signature.inputs, self.axes, self.steps)
        return source.task.added_to(written)

    def _head(self) -> HeadSpec | None:
        """Return the head of the source, if all of its outputs can be served."""
        head, served = self.source.task.head, {spec.name for spec in self.assembled.outputs}
        if head is not None and not served.issuperset(head.outputs):
            self.steps.warn(f"the head is left out, because output {head.outputs[0]!r} cannot be served")
            return None
        return head


def steps_of(source: Source, options: Options) -> tuple[Step[Conversion], ...]:
    """Return the steps that convert a source with these options, in order."""
    reduces = options.precision != "fp32" or options.requantize is not None
    exporters = options.try_more and len(source.exporters) > 1 and options.precision == "fp32"
    rewrites = options.try_more and options.target == CPU
    every = (
        (reduces, Step("reduce", "changing the precision", Conversion.reduce)),
        (options.fuse, Step("fuse", "fusing attention", Conversion.fuse)),
        (exporters, Step("exporters", "trying other exporters", Conversion.try_exporters)),
        (True, Step("assemble", "adding taps", Conversion.assemble)),
        (True, Step("limits", "running the greatest lengths and batches", Conversion.limit)),
        (True, Step("certify", "proving that batches are safe", Conversion.certify)),
        (True, Step("check", "checking against the source", Conversion.check)),
        (rewrites, Step("rewritings", "trying the runtime's rewritings", Conversion.try_rewritings)),
        (True, Step("describe", "writing the manifest", Conversion.describe)),
        (reduces, Step("quality", "comparing with the source's precision", Conversion.measure_quality)),
        (True, Step("warm_up", "running the server's warm-up", Conversion.warm_up)),
        (True, Step("past", "comparing sequences with a past", Conversion.continue_past)),
        (True, Step("golden", "recording golden answers", Conversion.make_golden)),
        (True, Step("write", "writing the bundle", Conversion.write)),
    )
    return tuple(step for applies, step in every if applies)
