"""Export: from a Hugging Face model folder to a bundle that was seen to answer like it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from attnserve_server.build import torch_source
from attnserve_server.build.assemble import Assembled, assemble, axes_of, rows_are_independent
from attnserve_server.build.check import CHECK_LENGTHS, judge, row_sum_error
from attnserve_server.build.errors import BuildRefused, CheckFailed
from attnserve_server.build.feeds import Sampler
from attnserve_server.build.graph import checked
from attnserve_server.build.probe import croppers, max_abs
from attnserve_server.build.progress import Steps
from attnserve_server.build.runtime import Runner, time_ratio
from attnserve_server.build.signature import SEQUENCE, signature_of
from attnserve_server.build.source import ModelFolder, model_folder
from attnserve_server.build.taps import WEIGHTS_PREFIX
from attnserve_server.build.torch_source import TorchModel
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import CheckReport, Manifest, Provenance, TextSpec
from attnserve_server.model.repository import MODEL_FILE, TOKENIZER_FILE, UNSEALED, Bundle, Repository, write_bundle
from attnserve_server.model.tokenizer import TextTokenizer

POOLINGS = ("", "mean")


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What to export. `version` empty: the next one. `pooling` "mean" adds the output `embedding`."""

    source: str
    name: str
    repository: Path
    version: str = ""
    pooling: str = ""
    normalize: bool = False
    max_batch_size: int = 32
    expect_sha256: str = ""


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
    with steps.shown(total=8), tempfile.TemporaryDirectory(prefix="attnserve-export-") as work:
        steps.begin("verifying the source")
        folder = model_folder(request.source, request.expect_sha256)
        if request.pooling and folder.normalises() and not request.normalize:
            steps.warn("the source also scales its embedding to length 1; --normalize does the same")
        return _export(replace(request, version=version), folder, Path(work), steps)


def _export(request: ExportRequest, folder: ModelFolder, work: Path, steps: Steps) -> Bundle:
    if folder.tokenizer_path is not None:
        TextTokenizer.load(folder.tokenizer_path, SEQUENCE)
    steps.begin("loading the model")
    model = torch_source.load(folder.path, "sdpa", request.pooling, normalize=request.normalize)
    if folder.architecture() not in {"", model.architecture}:
        steps.warn(f"{folder.architecture()} is brought as {model.architecture}: its head and its scores are left out")
    steps.begin("exporting to ONNX")
    proto = checked(torch_source.to_graph(model), folder.name)
    signature = signature_of(proto.graph, model.padding_id)
    sampler = Sampler(signature, model.vocabulary_size)
    assembled = assemble(proto, sampler, work, steps)
    if not assembled.sites:
        raise BuildRefused(f"{model.architecture} exports without attention operators, so there is nothing to tap")
    max_length = min(model.max_length, folder.tokenizer_max_length() or model.max_length)
    axes, padding = axes_of(assembled, {SEQUENCE: max_length}, steps)
    steps.begin("checking against the source")
    report = _check(assembled, folder, request, padding)
    judge(report, assembled.tolerances.row_sum)
    steps.begin("writing the bundle")
    files = {MODEL_FILE: assembled.model_path}
    if folder.tokenizer_path is not None:
        files[TOKENIZER_FILE] = folder.tokenizer_path
    manifest = Manifest(
        name=request.name,
        version=request.version,
        digest=UNSEALED,
        files={},
        precision=assembled.precision,
        max_batch_size=request.max_batch_size if rows_are_independent(assembled, steps) else 1,
        axes=axes,
        inputs=signature.inputs,
        outputs=assembled.outputs,
        sites=assembled.sites,
        vocabulary_size=model.vocabulary_size,
        text=TextSpec(axis=SEQUENCE, max_tokens=max_length) if folder.tokenizer_path is not None else None,
        provenance=Provenance(
            source=folder.name,
            source_sha256=folder.sha256,
            exporter="torch.onnx.export, dynamo",
            opset=torch_source.OPSET,
            created=now(),
            versions=model.versions,
        ),
        check=report,
    )
    return write_bundle(request.repository, manifest, files)


def _check(assembled: Assembled, folder: ModelFolder, request: ExportRequest, padding: float | None) -> CheckReport:
    """Compare the tapped graph with the source's eager mode, on mixed lengths in one padded batch."""
    eager = torch_source.load(folder.path, "eager", request.pooling, normalize=request.normalize)
    tapped = Runner(assembled.model_path)
    feeds, lengths = assembled.sampler.mixed(CHECK_LENGTHS)
    outputs = [spec.name for spec in assembled.outputs]
    found = tapped.run(feeds, [*outputs, *assembled.weights.values()])
    expected_outputs, attentions = torch_source.eager_answers(eager, feeds)
    expected = {**expected_outputs, **_by_site(assembled, eager, attentions)}
    worst_output = worst_weight = worst_sum = 0.0
    for row, own in enumerate(lengths):
        for name, crop in croppers(assembled.outputs, assembled.site_axes, own).items():
            error = max_abs(crop(found[name][row]), crop(expected[name][row]))
            if name.startswith(WEIGHTS_PREFIX):
                worst_weight = max(worst_weight, error)
                worst_sum = max(worst_sum, row_sum_error(crop(found[name][row])))
            else:
                worst_output = max(worst_output, error)
    return CheckReport(
        against=f"{eager.architecture} in torch, eager attention",
        lengths=CHECK_LENGTHS,
        output_max_abs_error=worst_output,
        output_tolerance=assembled.tolerances.output,
        weight_max_abs_error=worst_weight,
        weight_tolerance=assembled.tolerances.weight,
        row_sum_max_abs_error=worst_sum,
        padding_max_abs_error=padding,
        tapped_over_source_time=time_ratio(tapped, assembled.source, feeds, outputs),
    )


def _by_site(assembled: Assembled, eager: TorchModel, attentions: Sequence[Array]) -> dict[str, Array]:
    """The source's weights under the names of the taps' outputs: both count their layers in order."""
    if len(attentions) != len(assembled.sites):
        raise CheckFailed(
            f"check failed: {len(assembled.sites)} sites in the graph, but {eager.architecture} gives "
            f"{len(attentions)} attention tensors; no bundle was written"
        )
    return {WEIGHTS_PREFIX + site.name: attentions[site.layer] for site in assembled.sites}


def now() -> str:
    """The wall time, for provenance alone, as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")  # noqa: TID251 - provenance
