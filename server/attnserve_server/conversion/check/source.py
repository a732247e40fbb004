"""Compare a bundle with its source on the same sequences: by tolerance, or in int8 by quality.

A bundle is the folder of a converted model. A source that differs is a failed finding; one that cannot be read raises
BuildRefused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from attnserve_server.conversion.assemble import assemble
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.caches.splitting import whole_sequences
from attnserve_server.conversion.check.findings import Finding
from attnserve_server.conversion.check.opened import Opened
from attnserve_server.conversion.graphs.reading import checked, read_graph, save
from attnserve_server.conversion.precision.comparison import Subject
from attnserve_server.conversion.precision.quality import measure
from attnserve_server.conversion.precision.sentences import material_of
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.rewrite.repair import repaired
from attnserve_server.conversion.sources.source import TorchModel
from attnserve_server.conversion.sources.torch_source import AUTO, export_graph, load_model
from attnserve_server.conversion.verify.compare import Reference, differences
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.report import QualityReport
from attnserve_server.model.tokenizer import TextTokenizer

_POOLED = "embedding"
"""Name of the output that `export --pooling mean` adds."""


def compare_with_source(opened: Opened, against: str, steps: Steps) -> tuple[list[Finding], QualityReport | None]:
    """Compare outputs, and weights if the source returns them; in int8, measure the quality instead.

    Args:
        opened: the bundle.
        against: an .onnx file, or the name of a torch model; see `load_model`.
        steps: receives warnings.

    Returns:
        The findings, and the quality report: the bundle's own, or a new one in int8.

    Raises:
        BuildRefused: the source cannot be read.
    """
    manifest, stored = opened.manifest, opened.manifest.check.quality
    reduced = manifest.precision == "int8"
    if against.endswith(".onnx") or Path(against).is_file():
        proto = whole_sequences(repaired(read_graph(Path(against)), Path(against).name), Path(against).name)
        unlike = _unlike(manifest, [value.name for value in proto.graph.input])
        if unlike:
            return [unlike], stored
        if reduced:
            return [], _measured(opened, proto, Path(against).name)
        return [_outputs(opened, proto)], stored
    own = manifest.embedding is not None and manifest.embedding.own
    pooled = _has_pooled(manifest) and not own
    source = load_model(
        against,
        pooling="mean" if pooled else "",
        normalize=pooled and _normalizes(opened),
        head=own or manifest.head is not None,
        steps=Steps.silent(),
    )
    unlike = _other_vocabulary(manifest, source)
    if unlike:
        return [unlike], stored
    if reduced:
        graph, _, _ = export_graph(source, AUTO, 0, steps)
        return [], _measured(opened, checked(graph, source.name), source.name)
    return _answers(opened, source), stored


def _answers(opened: Opened, source: TorchModel) -> list[Finding]:
    """Compare outputs and weights with those of a torch model."""
    manifest, tolerances = opened.manifest, opened.tolerances
    feeds, lengths = opened.mixed()
    names = [spec.name for spec in manifest.outputs]
    found = opened.runner.run(feeds, [*names, *(str(site.weights_output) for site in manifest.sites if site.available)])
    try:
        reference = source.reference(feeds)
    except Exception as fault:  # noqa: BLE001 - the boundary to torch, which raises many types here
        return [Finding(what="outputs", passed=False, detail=f"the source does not run: {type(fault).__name__}")]
    if not set(names) & set(reference.outputs):
        return [Finding(what="outputs", passed=False, detail=f"the source has no output {names[0]}")]
    if len(reference.weights) != len(manifest.sites):
        why = f"the source gives {len(reference.weights)} attention tensors for {len(manifest.sites)} sites"
        return [Finding(what="attention weights", passed=False, detail=why)]
    try:
        worst = differences(manifest.outputs, manifest.sites, found, reference, lengths)
    except (IndexError, ValueError):
        return [
            Finding(what="outputs", passed=False, error=float("inf"), detail="the source's outputs have other shapes")
        ]
    findings = [Finding.of("outputs", worst.output, tolerances.output, f"beside {source.architecture}")]
    if any(weights is not None for weights in reference.weights):
        findings.append(Finding.of("attention weights", worst.weight, tolerances.weight, "beside its eager mode"))
    return findings


def _outputs(opened: Opened, proto: onnx.ModelProto) -> Finding:
    """Compare outputs with those of a file."""
    path = opened.work / "source.onnx"
    save(ir.from_proto(proto), path)
    feeds, lengths = opened.mixed()
    common = [spec for spec in opened.manifest.outputs if spec.name in {value.name for value in proto.graph.output}]
    if not common:
        return Finding(
            what="outputs", passed=False, detail=f"the source has no output {opened.manifest.outputs[0].name}"
        )
    names = [spec.name for spec in common]
    found, expected = opened.runner.run(feeds, names), GraphRunner(path).run(feeds, names)
    if any(found[name].shape != expected[name].shape for name in names):
        return Finding(
            what="outputs", passed=False, error=float("inf"), detail="the source's outputs have other shapes"
        )
    worst = differences(common, (), found, Reference(expected, []), lengths)
    return Finding.of("outputs", worst.output, opened.tolerances.output, "beside the file")


def _measured(opened: Opened, proto: onnx.ModelProto, name: str) -> QualityReport:
    """Measure the quality of a bundle in int8 against its source's graph, which is tapped in its own precision."""
    manifest = opened.manifest
    place = opened.work / "reference"
    place.mkdir()
    true = assemble(proto, opened.sampler, place, Steps.silent())
    described = manifest.model_copy(update={"sites": true.sites, "outputs": true.outputs, "precision": true.precision})
    reference = Subject(RuntimeSession.load(true.model_path, provider="CPUExecutionProvider"), described)
    path, text = opened.bundle.tokenizer_path, manifest.text
    written = manifest.text_as_written
    tokenizer = TextTokenizer.load(path, text.axis, written) if path is not None and text is not None else None
    material = material_of(manifest, tokenizer, opened.sampler)
    own = Subject(opened.session, manifest)
    if manifest.check.requantize is not None:
        return measure(own, reference, material, f"{name}, each sequence alone", alone=True)
    return measure(own, reference, material, f"{name} in {true.precision}")


def _has_pooled(manifest: Manifest) -> bool:
    return any(spec.name == _POOLED for spec in manifest.outputs)


def _normalizes(opened: Opened) -> bool:
    """Return whether the bundle scales its pooled output to length 1. Its manifest does not record it, so it is run."""
    if not _has_pooled(opened.manifest):
        return False
    feeds, _ = opened.mixed()
    pooled = opened.runner.run(feeds, [_POOLED])[_POOLED]
    return bool(np.allclose(np.linalg.norm(pooled.astype(np.float64), axis=-1), 1.0, atol=1e-3))


def _unlike(manifest: Manifest, names: list[str]) -> Finding | None:
    missing = [spec.name for spec in manifest.inputs if spec.name not in names]
    return Finding(what="outputs", passed=False, detail=f"the source has no input {missing[0]}") if missing else None


def _other_vocabulary(manifest: Manifest, source: TorchModel) -> Finding | None:
    """Return a finding if the vocabularies differ: the source is another model, and might not run on the ids.

    Raises:
        BuildRefused: the source lacks an axis of the bundle.
    """
    for spec in manifest.inputs:
        own, theirs = manifest.vocabulary_of(spec), source.vocabulary_sizes.get(spec.name)
        if theirs is not None and own and own != theirs:
            return Finding(what="outputs", passed=False, detail=f"the source has {theirs} ids, the bundle {own}")
    if not any(isinstance(extent, str) for spec in manifest.inputs for extent in spec.shape):
        return None
    symbols = {extent for spec in manifest.inputs for extent in spec.shape if isinstance(extent, str)}
    missing = sorted(symbols - set(source.max_lengths))
    if missing:
        raise BuildRefused(f"{source.name} has no axis {missing[0]!r}: the bundle is of another model")
    return None
