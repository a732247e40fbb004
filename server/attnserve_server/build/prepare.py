"""Prepare: from a bare ONNX file, that somebody else exported, to a bundle that was seen to answer like it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from attnserve_server.build.assemble import Assembled, axes_of, rows_are_independent
from attnserve_server.build.check import CHECK_LENGTHS, judge, row_sum_error
from attnserve_server.build.errors import BuildRefused
from attnserve_server.build.export import now
from attnserve_server.build.feeds import Sampler
from attnserve_server.build.fusion import assemble_fused
from attnserve_server.build.graph import read_graph
from attnserve_server.build.probe import croppers, max_abs, probe_max_length
from attnserve_server.build.products import product_errors
from attnserve_server.build.progress import Steps
from attnserve_server.build.runtime import Runner, time_ratio
from attnserve_server.build.signature import Signature, signature_of
from attnserve_server.build.text import padding_id_of, text_of
from attnserve_server.model.manifest import CheckReport, InputRole, Manifest, Provenance
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


@dataclass(frozen=True, slots=True)
class PrepareRequest:
    """What to prepare. `max_length` bounds every dynamic axis; the graph may turn out to take less.

    `pair_start`: where the second text has an input of its own, the id of the token that it starts behind. `fuse`: try
    fused operators in the place of decomposed attention, and keep them where that is faster.
    """

    file: Path
    name: str
    repository: Path
    version: str = ""
    tokenizer: Path | None = None
    max_length: int = 512
    max_batch_size: int = 32
    pair_start: int | None = None
    fuse: bool = True


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
    with steps.shown(total=8), tempfile.TemporaryDirectory(prefix="attnserve-prepare-") as work:
        steps.begin("reading the file")
        padding_id = padding_id_of(request.tokenizer)
        proto = read_graph(request.file)
        return _prepare(replace(request, version=version), proto, padding_id, Path(work), steps)


def _prepare(request: PrepareRequest, proto: onnx.ModelProto, padding_id: int, work: Path, steps: Steps) -> Bundle:
    signature = signature_of(proto.graph, padding_id)
    ids = [spec for spec in signature.inputs if spec.role is InputRole.TOKEN_IDS]
    for spec in ids:
        if not spec.vocabulary_size:
            steps.warn(f"the vocabulary behind {spec.name!r} cannot be told: ids past its end will fail at run time")
    if request.tokenizer is not None:
        _check_text(request, request.tokenizer, signature, steps)
    max_batch_size = signature.fixed_batch or request.max_batch_size
    if signature.fixed_batch:
        steps.warn("the batch axis is fixed at 1: every sequence will run alone")
    sampler = Sampler(signature)
    assembled, fusion = assemble_fused(proto, sampler, work, steps, fuse=request.fuse)
    if not assembled.sites:
        steps.warn(f"{request.file.name} has no attention that is known: it will be served without weights")
    if not rows_are_independent(assembled, steps):
        max_batch_size = 1
    max_lengths = _max_lengths(assembled, signature, request.max_length)
    axes, padding = axes_of(assembled, max_lengths, steps)
    steps.begin("checking against the source")
    report = _check(assembled, max_lengths, padding, paddable=all(axis.paddable or axis.fixed for axis in axes))
    report = report.model_copy(update={"fusion": fusion})
    judge(report, assembled.tolerances.row_sum)
    steps.begin("writing the bundle")
    files = {MODEL_FILE: assembled.model_path}
    if request.tokenizer is not None:
        files[TOKENIZER_FILE] = request.tokenizer
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
        sites=assembled.sites,
        vocabulary_size=ids[0].vocabulary_size if ids else 0,
        text=text_of(signature.inputs, max_lengths, request.pair_start) if request.tokenizer is not None else None,
        provenance=Provenance(
            source=request.file.name,
            source_sha256=sha256_of(request.file),
            exporter=" ".join(part for part in (proto.producer_name, proto.producer_version) if part) or "unknown",
            opset=next((entry.version for entry in proto.opset_import if entry.domain in {"", "ai.onnx"}), 0),
            created=now(),
            versions={"onnx": onnx.__version__},
        ),
        check=report,
    )
    return write_bundle(request.repository, manifest, files)


def _check_text(request: PrepareRequest, tokenizer: Path, signature: Signature, steps: Steps) -> None:
    """Before the long steps: whether a tokenizer can be used, and with it text; says what text cannot fill."""
    text = text_of(signature.inputs, dict.fromkeys(signature.symbols, request.max_length), request.pair_start)
    if text is None:
        raise BuildRefused(f"{request.file.name} has no input of token ids, such as input_ids, that text could fill")
    TextTokenizer.load(tokenizer, text.axis)
    beyond = [spec.name for spec in signature.inputs if spec.fill is None and spec.role is not InputRole.TOKEN_IDS]
    if beyond:
        steps.warn(f"input {beyond[0]!r} cannot be made from text: clients must send tensors")


def _max_lengths(assembled: Assembled, signature: Signature, wanted: int) -> dict[str, int]:
    """For each axis symbol the greatest length on which the graph runs, up to `wanted`."""
    output = assembled.outputs[0].name
    return {
        symbol: probe_max_length(assembled.source, assembled.sampler, symbol, wanted, output)
        for symbol in signature.symbols
    }


def _check(assembled: Assembled, max_lengths: dict[str, int], padding: float | None, *, paddable: bool) -> CheckReport:
    """Tapped against untapped, and weights @ value against each operator's own output.

    On mixed lengths in one padded batch; sequences of one length where padding is not harmless, one sequence where the
    graph takes no more.
    """
    longest = min(max_lengths.values(), default=max(CHECK_LENGTHS))
    lengths = tuple(min(length, longest) for length in CHECK_LENGTHS)
    if assembled.sampler.signature.fixed_batch:
        lengths = lengths[:1]
    if not paddable:
        lengths = (lengths[-1],) * len(lengths)
    feeds, each = assembled.sampler.mixed(lengths)
    tapped = Runner(assembled.model_path)
    outputs = [spec.name for spec in assembled.outputs]
    expected = assembled.source.run(feeds, outputs)
    found = tapped.run(feeds, [*outputs, *assembled.weights.values()])
    worst_output = 0.0
    for row, own in enumerate(each):
        for name, crop in croppers(assembled.outputs, {}, own).items():
            worst_output = max(worst_output, max_abs(crop(found[name][row]), crop(expected[name][row])))
    weights = {name: found[output] for name, output in assembled.weights.items()}
    products = product_errors(assembled.checker, assembled.found, weights, feeds)
    sums = [row_sum_error(own) for name, own in weights.items() if assembled.found[name].rows_sum_to_one]
    return CheckReport(
        against="the file itself, weights @ value with each operator's own output",
        lengths=lengths,
        output_max_abs_error=worst_output,
        output_tolerance=assembled.tolerances.output,
        weight_max_abs_error=max(products.values(), default=0.0),
        weight_tolerance=assembled.tolerances.output,
        row_sum_max_abs_error=max(sums, default=0.0),
        padding_max_abs_error=padding,
        tapped_over_source_time=time_ratio(tapped, assembled.source, feeds, outputs) if assembled.site_axes else None,
    )
