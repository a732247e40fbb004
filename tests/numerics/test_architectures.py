"""Architectures with more than one sequence: bundles against Hugging Face's own eager attention, on both sides."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import tiny_source
from attnserve_server.build.export import ExportRequest, export_bundle
from attnserve_server.model.manifest import Manifest

# float32 sums in another order than torch's.
OUTPUT_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 1e-5


def exported(name: str, work: Path, exporter: str = "torchscript") -> Manifest:
    source = tiny_source(work / "source", name)
    request = ExportRequest(source=str(source), name="tiny", repository=work / "models", exporter=exporter)
    return export_bundle(request).manifest


@pytest.mark.parametrize("name", ["BART", "T5"])
def test_encoder_decoder_gives_its_own_its_causal_and_its_cross_attention(name: str, tmp_path: Path) -> None:
    manifest = exported(name, tmp_path)
    own, causal, cross = ("self", "source_seq", "source_seq"), ("causal", "seq", "seq"), ("cross", "seq", "source_seq")
    sites = [(site.kind, site.query_axis, site.key_axis) for site in manifest.sites if site.available]
    assert sites == [own, own, causal, cross, causal, cross]
    assert manifest.check.weight_max_abs_error <= WEIGHT_TOLERANCE
    assert manifest.check.output_max_abs_error <= OUTPUT_TOLERANCE
    assert [(axis.symbol, axis.paddable) for axis in manifest.axes] == [("source_seq", True), ("seq", True)]
    assert {spec.name for spec in manifest.outputs} == {"last_hidden_state", "encoder_last_hidden_state"}


def test_image_text_model_knows_its_patches_from_its_words(tmp_path: Path) -> None:
    manifest = exported("CLIP", tmp_path)
    image, text = ("self", "fixed_10", "fixed_10"), ("causal", "seq", "seq")
    sites = [(site.kind, site.query_axis, site.key_axis) for site in manifest.sites if site.available]
    assert sites == [image, image, text, text]
    assert manifest.check.weight_max_abs_error <= WEIGHT_TOLERANCE
    patches = manifest.axis("fixed_10")
    assert (patches.grid, patches.leading) == ((3, 3), 1)


def test_exporters_agree_on_the_sites_of_an_architecture(tmp_path: Path) -> None:
    traced = exported("DistilBERT", tmp_path / "torchscript")
    exported_by_dynamo = exported("DistilBERT", tmp_path / "dynamo", "dynamo")
    assert [site.name for site in traced.sites] == [site.name for site in exported_by_dynamo.sites]
    assert (traced.provenance.opset, exported_by_dynamo.provenance.opset) == (17, 23)
