"""Prepare: from a bare ONNX file, that somebody else exported, to a bundle that was seen to answer like it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from attnserve_server.conversion.assemble import Assembled, axes_of
from attnserve_server.conversion.base.errors import BuildRefused, CheckFailed
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.base.tolerances import judge
from attnserve_server.conversion.choose.fusion import fused
from attnserve_server.conversion.choose.trials import fastest
from attnserve_server.conversion.export import now
from attnserve_server.conversion.graphs.reading import checked, read_graph
from attnserve_server.conversion.inputs.signature import Signature, in_float16, signature_of
from attnserve_server.conversion.inputs.text import padding_id_of, text_of, written_text
from attnserve_server.conversion.learning.batch_axis import (
    BATCH_FIRST,
    batch_on_axis_1,
    names_the_batch_first,
    takes_one_row_alone,
)
from attnserve_server.conversion.learning.inputs import with_equal_axes, with_free_length, with_needed_keys
from attnserve_server.conversion.precision.calibration import ranges_of
from attnserve_server.conversion.precision.choose import Precision, in_precision
from attnserve_server.conversion.precision.per_row import Scheme, with_scale_per_row
from attnserve_server.conversion.precision.quality import with_quality
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.verify.certify import ATTACK_SECONDS, certify
from attnserve_server.conversion.verify.compare import check_against_itself
from attnserve_server.conversion.verify.golden import with_golden
from attnserve_server.conversion.verify.limits import as_the_server_warms_up, true_limits
from attnserve_server.model.certificate import Batching, Verdict
from attnserve_server.model.manifest import BATCH, InputRole, Manifest, Provenance, TextSpec
from attnserve_server.model.report import RequantizeReport, TrialReport
from attnserve_server.model.repository import (
    MODEL_FILE,
    TOKENIZER_FILE,
    UNSEALED,
    Bundle,
    Repository,
    sha256_of,
    write_bundle,
)
from attnserve_server.model.tokenizer import TextTokenizer

_OVER_ROWS = ("shares out over the rows", "sums over the rows")
"""What the proof says of attention that runs over the batch: its axes may be swapped."""
_CALIBRATION_TOKENS = 128
"""How much of a sentence is looked at before it is known how long a text the graph takes."""


@dataclass(frozen=True, slots=True)
class PrepareRequest:
    """What to prepare. `max_length` bounds every dynamic axis; the graph may turn out to take less.

    `pair_start`: where the second text has an input of its own, the token that it starts behind; empty: none. `fuse`:
    try fused operators in the place of decomposed attention, and keep them where that is faster. `precision` fp32 keeps
    the file's own. `try_more`: try the runtime's own rewritings, and keep what is faster. `require_attention`: refuse a
    file none of whose weights can be had, rather than serve it without. `batching`: the policy that warnings and checks
    are for. `attack_seconds`: the most that trying to break what is not proved may take. `requantize` "per-row": give
    dynamic quantizers one scale per row; None: leave them.
    """

    file: Path
    name: str
    repository: Path
    version: str = ""
    tokenizer: Path | None = None
    max_length: int = 512
    max_batch_size: int = 32
    pair_start: str = ""
    require_attention: bool = False
    fuse: bool = True
    try_more: bool = False
    precision: Precision = "fp32"
    batching: Batching = "proved"
    attack_seconds: float = ATTACK_SECONDS
    requantize: Scheme | None = None


def prepare_bundle(request: PrepareRequest, steps: Steps | None = None) -> Bundle:
    """Tap an ONNX file and write its bundle, unless the check at the end finds a difference.

    A file without attention is prepared too, with a warning: it is served like any other, without weights.

    Raises:
        TokenizerInvalid: the tokenizer cannot be used.
        BuildRefused: the file cannot be served; CheckFailed where the tapped graph answers otherwise.
        BundleInvalid: there is such a version already, or the disk refused.
    """
    steps = steps or Steps.silent()
    version = Repository(request.repository).free_version(request.name, request.version)
    total = 10 if request.try_more else 9
    with steps.shown(total), tempfile.TemporaryDirectory(prefix="attnserve-prepare-") as work:
        steps.begin("reading the file")
        padding_id = padding_id_of(request.tokenizer)
        proto = read_graph(request.file)
        request = replace(request, version=version)
        if request.tokenizer is not None:
            freed = with_free_length(proto, signature_of(proto.graph, padding_id), Path(work))
            if freed is not None:
                proto, length = freed
                request = replace(request, max_length=min(request.max_length, length))
                steps.warn(f"the length of {length} is not needed: text of up to {request.max_length} tokens is served")
        return _prepare(request, proto, padding_id, Path(work), steps)


def _prepare(request: PrepareRequest, proto: onnx.ModelProto, padding_id: int, work: Path, steps: Steps) -> Bundle:
    signature = with_equal_axes(proto, signature_of(proto.graph, padding_id), work)
    if request.precision == "fp16":
        signature = in_float16(signature)
    try:
        return _as_signed(request, proto, signature, work, steps)
    except CheckFailed:
        raise
    except BuildRefused:
        if signature.fixed_batch or not takes_one_row_alone(proto, signature, work):
            raise
    steps.warn("the graph does not take three rows in a batch: it is prepared again with the batch fixed at 1")
    for value in proto.graph.input:
        if value.name in {spec.name for spec in signature.inputs}:
            value.type.tensor_type.shape.dim[0].dim_value = 1
    return _as_signed(request, proto, replace(signature, fixed_batch=1), work, steps)


def _as_signed(
    request: PrepareRequest, proto: onnx.ModelProto, signature: Signature, work: Path, steps: Steps
) -> Bundle:
    ids = [spec for spec in signature.inputs if spec.role is InputRole.TOKEN_IDS]
    _tell_bounds(signature, steps)
    pair_start = None
    if request.tokenizer is not None:
        pair_start = _check_text(request, request.tokenizer, signature, steps)
    max_batch_size = signature.fixed_batch or request.max_batch_size
    if signature.fixed_batch:
        steps.warn("the batch axis is fixed at 1: every sequence will run alone")
    sampler = Sampler(signature)
    reduced, requantized = _requantized(request, proto, steps)
    if request.precision != "fp32":
        short = dict.fromkeys(signature.symbols, min(request.max_length, _CALIBRATION_TOKENS))
        text = text_of(signature.inputs, short, pair_start) if request.precision == "int8" else None
        ranges = ranges_of(proto, signature.inputs, text, request.tokenizer, work)
        reduced = checked(in_precision(reduced, request.precision, ranges), request.file.name)
    steps.begin("fusing attention")
    rewritten = fused(reduced, sampler, work, fuse=request.fuse)
    assembled = rewritten.assembled(sampler, work, steps)
    _tell_attention(request, assembled, steps)
    wanted = dict.fromkeys(signature.symbols, request.max_length)
    max_lengths, max_batch_size = true_limits(assembled, wanted, max_batch_size, steps)
    certified = certify(
        assembled,
        max_lengths,
        steps,
        batching=request.batching,
        attack_seconds=request.attack_seconds,
        max_batch_size=max_batch_size,
    )
    certificate = certified.certificate
    batch = certificate.clause(BATCH)
    if batch.status() == Verdict.REFUTED and any(words in batch.reason for words in _OVER_ROWS):
        _refuse_swapped_axes(proto, assembled, steps)
    axes = axes_of(assembled, max_lengths, certificate, request.batching)
    steps.begin("checking against the source")
    paddable = all(axis.paddable or axis.fixed for axis in axes)
    report = check_against_itself(assembled, max_lengths, max_batch_size, paddable=paddable)
    judge(report, assembled.tolerances.row_sum)
    left_out: tuple[str, ...] | None = None
    trials: tuple[TrialReport, ...] = ()
    if request.try_more:
        left_out, trials = fastest(assembled, work, steps)
    report = report.model_copy(update={"fusion": rewritten.report, "trials": trials, "requantize": requantized})
    steps.begin("writing the bundle")
    files = {MODEL_FILE: assembled.model_path}
    served_text: TextSpec | None = None
    if request.tokenizer is not None:
        files[TOKENIZER_FILE] = request.tokenizer
        served_text = written_text(
            request.tokenizer, text_of(signature.inputs, max_lengths, pair_start), signature.inputs, axes, steps
        )
    manifest = Manifest(
        name=request.name,
        version=request.version,
        digest=UNSEALED,
        files={},
        precision=assembled.precision,
        max_batch_size=max_batch_size,
        axes=axes,
        inputs=with_needed_keys(assembled.source, sampler, [spec.name for spec in assembled.outputs]),
        outputs=assembled.outputs,
        sites=certified.sites,
        vocabulary_size=ids[0].vocabulary_size if ids else 0,
        text=served_text,
        left_out=left_out,
        provenance=Provenance(
            source=request.file.name,
            source_sha256=sha256_of(request.file),
            exporter=" ".join(part for part in (proto.producer_name, proto.producer_version) if part) or "unknown",
            opset=next((entry.version for entry in proto.opset_import if entry.domain in {"", "ai.onnx"}), 0),
            created=now(),
            versions={"onnx": onnx.__version__},
        ),
        check=report,
        certificate=certificate,
    )
    if reduced is not proto:
        manifest = with_quality(
            manifest,
            assembled.model_path,
            proto,
            sampler,
            request.tokenizer,
            work,
            steps,
            request.batching,
            alone=requantized is not None,
        )
    manifest, session = as_the_server_warms_up(manifest, assembled.model_path, steps)
    manifest, golden = with_golden(manifest, session, sampler, work, steps, request.batching)
    return write_bundle(request.repository, manifest, {**files, **golden})


def _refuse_swapped_axes(proto: onnx.ModelProto, assembled: Assembled, steps: Steps) -> None:
    """Refuse, or warn of, a graph whose rows mix along the first axis and are apart along the second."""
    swapped = batch_on_axis_1(
        assembled.source, assembled.sampler, assembled.outputs, assembled.sites, assembled.tolerances.neighbours
    )
    if not swapped:
        return
    said = (
        f"the batch may be axis 1 of {', '.join(map(repr, swapped))}: rows along axis 0 change each other's answers, "
        f"and positions along axis 1 do not; {BATCH_FIRST}"
    )
    if not names_the_batch_first(proto.graph, swapped):
        raise BuildRefused(said)
    steps.warn(said)


def _requantized(
    request: PrepareRequest, proto: onnx.ModelProto, steps: Steps
) -> tuple[onnx.ModelProto, RequantizeReport | None]:
    """The graph with one scale per row where that is requested, and what was rewritten; warns of what was not."""
    if not request.requantize:
        return proto, None
    rewritten, report = with_scale_per_row(proto)
    if report.left:
        steps.warn(f"{report}; what is not rewritten keeps one scale for the whole batch")
    return checked(rewritten, request.file.name), report


def _tell_bounds(signature: Signature, steps: Steps) -> None:
    """Warn of inputs that look tables up and whose greatest legal number is not known."""
    for spec in signature.inputs:
        if spec.role is InputRole.TOKEN_IDS and not spec.vocabulary_size:
            steps.warn(f"the vocabulary behind {spec.name!r} cannot be told: ids past its end will fail at run time")
        indexes = spec.role is InputRole.DATA and not spec.dtype.startswith("float")
        if indexes and spec.name in signature.unbounded and not spec.index_ranges:
            steps.warn(f"the rows behind {spec.name!r} cannot be told: numbers past their end will fail at run time")


def _tell_attention(request: PrepareRequest, assembled: Assembled, steps: Steps) -> None:
    """Refuse, or say, that no weights will come."""
    if request.require_attention and not assembled.site_axes:
        raise BuildRefused(f"{request.file.name} has no attention whose weights can be had")
    if not assembled.sites:
        steps.warn(f"{request.file.name} has no attention that is known: it will be served without weights")


def _check_text(request: PrepareRequest, file: Path, signature: Signature, steps: Steps) -> int | None:
    """Before the long steps: whether a tokenizer can be used, and with it text; says what text cannot fill.

    Returns the id of the token that the second text starts behind, if there is one.
    """
    lengths = dict.fromkeys(signature.symbols, request.max_length)
    text = text_of(signature.inputs, lengths)
    if text is None:
        raise BuildRefused(f"{request.file.name} has no input of token ids, such as input_ids, that text could fill")
    tokenizer = TextTokenizer.load(file, text.axis)
    pair_start = tokenizer.id_of(request.pair_start) if request.pair_start else None
    if request.pair_start and pair_start is None:
        raise BuildRefused(f"the tokenizer has no token {request.pair_start!r} for the second text to start behind")
    text_of(signature.inputs, lengths, pair_start)
    beyond = [spec.name for spec in signature.inputs if spec.fill is None and spec.role is not InputRole.TOKEN_IDS]
    if beyond:
        steps.warn(f"input {beyond[0]!r} cannot be made from text: clients must send tensors")
    return pair_start
