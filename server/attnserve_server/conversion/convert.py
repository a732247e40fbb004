"""Convert a torch model or an ONNX file to a bundle, whose answers were compared with those of its source."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from attnserve_server.conversion.base.errors import BuildRefused, CheckFailed
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.pipeline import Conversion, Options, steps_of
from attnserve_server.conversion.sources.onnx_file import OnnxFile
from attnserve_server.conversion.sources.source import Source, SourceGraph, ZooOptions
from attnserve_server.conversion.sources.torch_source import AUTO, TorchSource
from attnserve_server.model.repository import Bundle, Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest(Options):
    """A torch model, and the options of its conversion. `TorchSource` documents the fields in full.

    Attributes:
        source: `zoo:NAME`, the path of a Hugging Face folder, or `package:NAME`.
        pooling: "mean" adds the output `embedding`; empty: no such output. `normalize` scales it to length 1.
        normalize: see `pooling`.
        expect_sha256: the required digest of the weights; empty: any.
        head: whether to keep the head of a classifier.
        exporter: `auto`, `dynamo` or `torchscript`.
        opset: of the exported graph; 0: the exporter's default.
        zoo_options: size and seed of a model of the zoo.
        embedding_sizes: numbers of first values of the embedding that are embeddings too; empty: as its files state.
    """

    source: str
    pooling: str = ""
    normalize: bool = False
    expect_sha256: str = ""
    head: bool = True
    exporter: str = AUTO
    opset: int = 0
    zoo_options: ZooOptions = field(default_factory=ZooOptions)
    embedding_sizes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareRequest(Options):
    """An ONNX file, and the options of its conversion. `OnnxFile` documents the fields in full.

    Attributes:
        file: the ONNX file.
        tokenizer: its tokenizer.json; None: clients cannot send text.
        max_length: the greatest length along each axis of tokens; None: the default.
        max_lengths: the greatest lengths of single axes, by symbol.
        sizes: fixed sizes of dynamic axes, by symbol.
        pair_start: the token before the second text; empty: none.
    """

    file: Path
    tokenizer: Path | None = None
    max_length: int | None = None
    max_lengths: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    pair_start: str = ""


def export_bundle(request: ExportRequest, steps: Steps | None = None) -> Bundle:
    """Convert a torch model. See `convert`."""
    source = TorchSource(
        model=request.source,
        pooling=request.pooling,
        normalize=request.normalize,
        expect_sha256=request.expect_sha256,
        head=request.head,
        exporter=request.exporter,
        opset=request.opset,
        zoo_options=request.zoo_options,
        embedding_sizes=request.embedding_sizes,
    )
    return convert(source, request, steps)


def prepare_bundle(request: PrepareRequest, steps: Steps | None = None) -> Bundle:
    """Convert an ONNX file. See `convert`. A file without attention becomes a bundle without weights."""
    source = OnnxFile(
        file=request.file,
        tokenizer=request.tokenizer,
        max_length=request.max_length,
        max_lengths=request.max_lengths,
        sizes=request.sizes,
        pair_start=request.pair_start,
    )
    return convert(source, request, steps)


def convert(source: Source, options: Options, steps: Steps | None = None) -> Bundle:
    """Convert a model, and write its bundle unless the check against the source fails.

    Args:
        source: where the model is, and how to read it.
        options: name and version of the bundle, and choices of the conversion.
        steps: shows progress and warnings; None: silent.

    Raises:
        BuildRefused: the model cannot be converted with these options; CheckFailed if the converted graph gives other
            answers than the source.
        TokenizerInvalid: the tokenizer.json is not usable.
        BundleInvalid: the version exists already, or the bundle cannot be written.
    """
    steps = steps or Steps.silent()
    options = replace(options, version=Repository(options.repository).free_version(options.name, options.version))
    plan = steps_of(source, options)
    with steps.shown(1 + len(plan)), tempfile.TemporaryDirectory(prefix="attnserve-convert-") as folder:
        work = Path(folder)
        steps.begin(source.title)
        graph = source.read(work, steps)
        conversion = Conversion(graph, options, work / "conversion", steps)
        try:
            steps.run(plan, conversion)
        except CheckFailed:
            raise
        except BuildRefused as fault:
            alone = _alone(source, graph, fault, work, steps)
            conversion = Conversion(alone, options, work / "alone", steps)
            steps.extend(len(plan))
            steps.run(plan, conversion)
        return conversion.bundle


def _alone(source: Source, graph: SourceGraph, fault: BuildRefused, work: Path, steps: Steps) -> SourceGraph:
    """Return the graph for one row at a time, where its conversion failed because it takes no more.

    Raises:
        BuildRefused: it failed for another reason; with the axes that stay open, if the graph has any.
    """
    try:
        alone = source.without_batches(graph, work, steps)
    except BuildRefused as known:
        fault, alone = known, None
    if alone is not None:
        return alone
    raise BuildRefused(f"{fault}; {graph.open_axes}" if graph.open_axes else str(fault)) from None
