"""Architectures with more than one sequence: bundles against Hugging Face's own eager attention, on both sides.

`tiny_source` writes a tiny checkpoint of an architecture. Needs torch and transformers.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from architectures import tiny_source
from attnserve_client import Client, InferenceResult
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.convert import ExportRequest, export_bundle
from attnserve_server.conversion.sources.torch_source import load_model
from attnserve_server.conversion.sources.zoo import model as zoo
from attnserve_server.conversion.verify.compare import Reference
from attnserve_server.model.bands import GridBand
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.tokenizer import TextTokenizer
from serving import serve

# The zoo's tokenizer: one token for each byte.
TOKENIZER = Path(zoo.__file__).with_name("tokenizer.json")

# float32: the order of sums differs from torch's.
OUTPUT_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 1e-5
START = 2
"""The token before the text of BART's decoder."""
Array = npt.NDArray[Any]


def exported(name: str, work: Path, exporter: str = "torchscript") -> Manifest:
    source = tiny_source(work / "source", name)
    request = ExportRequest(source=str(source), name="tiny", repository=work / "models", exporter=exporter)
    return export_bundle(request).manifest


@pytest.mark.parametrize("name", ["BART", "T5"])
def test_encoder_decoder_has_self_causal_and_cross_attention(name: str, tmp_path: Path) -> None:
    manifest = exported(name, tmp_path)
    own, causal, cross = ("self", "source_seq", "source_seq"), ("causal", "seq", "seq"), ("cross", "seq", "source_seq")
    sites = [(site.kind, site.query_axis, site.key_axis) for site in manifest.sites if site.available]
    assert sites == [own, own, causal, cross, causal, cross]
    assert manifest.check.weight_max_abs_error <= WEIGHT_TOLERANCE
    assert manifest.check.output_max_abs_error <= OUTPUT_TOLERANCE
    assert [(axis.symbol, axis.paddable) for axis in manifest.axes] == [("source_seq", True), ("seq", True)]
    assert {spec.name for spec in manifest.outputs} == {"last_hidden_state", "encoder_last_hidden_state"}


def test_tokenizer_of_an_encoder_decoder_serves_both_sides(client: Client) -> None:
    model = client.model("bart")
    assert (model.text_axis, model.text_pair_axis) == ("source_seq", "seq")


def test_image_text_model_distinguishes_patches_and_words(tmp_path: Path) -> None:
    manifest = exported("CLIP", tmp_path)
    image, text = ("self", "fixed_10", "fixed_10"), ("causal", "seq", "seq")
    sites = [(site.kind, site.query_axis, site.key_axis) for site in manifest.sites if site.available]
    assert sites == [text, text, image, image]
    assert manifest.check.weight_max_abs_error <= WEIGHT_TOLERANCE
    patches = manifest.axis("fixed_10")
    assert (patches.grid, patches.leading) == ((3, 3), 1)


def test_windows_of_patches_shift_between_layers(tmp_path: Path) -> None:
    manifest = exported("Swin", tmp_path)
    bands = [site.band for site in manifest.sites if site.available]
    shifts = [0, 2]
    assert bands == [*(GridBand(rows=8, columns=8, window=4, shift=shift) for shift in shifts), None, None]
    assert [manifest.axis(site.query_axis).grid for site in manifest.sites] == [(8, 8), (8, 8), (4, 4), (4, 4)]
    assert manifest.check.weight_max_abs_error <= WEIGHT_TOLERANCE


def test_pooling_needs_a_model_of_one_text(tmp_path: Path) -> None:
    request = ExportRequest(
        source=str(tiny_source(tmp_path / "source", "ViT")), name="tiny", repository=tmp_path / "models", pooling="mean"
    )
    with pytest.raises(BuildRefused, match="ViTModel does not encode one text: remove --pooling mean"):
        export_bundle(request)


def test_exporters_agree_on_the_sites_of_an_architecture(tmp_path: Path) -> None:
    traced = exported("DistilBERT", tmp_path / "torchscript")
    exported_by_dynamo = exported("DistilBERT", tmp_path / "dynamo", "dynamo")
    assert [site.name for site in traced.sites] == [site.name for site in exported_by_dynamo.sites]
    assert (traced.provenance.opset, exported_by_dynamo.provenance.opset) == (17, 23)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders with the zoo's tokenizer."""
    work = tmp_path_factory.mktemp("sources")
    bart = tiny_source(work / "bart", "BART", vocab_size=300, pad_token_id=0, decoder_start_token_id=START)
    shutil.copy(TOKENIZER, bart / "tokenizer.json")
    return {
        "bart": bart,
        "clip": tiny_source(work / "clip", "CLIP"),
        "longformer": tiny_source(work / "l", "Longformer"),
    }


@pytest.fixture(scope="module")
def client(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of one server with the bundles of all folders."""
    repository = tmp_path_factory.mktemp("architectures")
    for name, source in folders.items():
        export_bundle(ExportRequest(source=str(source), name=name, repository=repository, exporter="torchscript"))
    with serve(repository, tmp_path_factory.mktemp("architectures-server")) as server, Client(server.target) as client:
        yield client


def eager(source: Path, **feeds: Array) -> Reference:
    """Return the model's own answer to one sequence without padding."""
    masks = {
        name.replace("input_ids", "attention_mask"): np.ones_like(ids) for name, ids in feeds.items() if ids.ndim == 1
    }
    return load_model(str(source)).reference({name: array[None] for name, array in {**feeds, **masks}.items()})


def assert_equal(result: InferenceResult, reference: Reference) -> None:
    for map_, weights in zip(result.attention, reference.weights, strict=True):
        assert weights is not None
        np.testing.assert_allclose(map_.weights, weights[0], rtol=0, atol=WEIGHT_TOLERANCE)
    assert set(result.outputs) == set(reference.outputs)
    for name, output in result.outputs.items():
        np.testing.assert_allclose(output, reference.outputs[name][0], rtol=0, atol=OUTPUT_TOLERANCE)


def test_pair_of_texts_fills_encoder_and_decoder(client: Client, folders: dict[str, Path]) -> None:
    tokenizer = TextTokenizer.load(TOKENIZER, "source_seq")
    ids = tokenizer.encode("A cat sat").ids
    decoder_ids = tokenizer.encode_second("le chat", "seq", start=START).ids
    assert (decoder_ids[0], len(ids) == len(decoder_ids)) == (START, False)
    result = client.infer("bart", ("A cat sat", "le chat"), attention=True)
    assert [map_.kind for map_ in result.attention] == ["self", "self", "causal", "cross", "causal", "cross"]
    assert_equal(result, eager(folders["bart"], input_ids=ids, decoder_input_ids=decoder_ids))


def test_maps_of_text_and_image_have_words_and_patches(client: Client, folders: dict[str, Path]) -> None:
    rng = np.random.default_rng(3)
    ids = rng.integers(2, 97, 7)
    pixels = rng.normal(size=(3, 24, 24)).astype(np.float32)
    result = client.infer("clip", {"input_ids": ids, "pixel_values": pixels}, attention=True)
    grid = result.attention[-1].grids["fixed_10"]
    assert (grid.rows, grid.columns, grid.leading) == (3, 3, 1)
    assert "fixed_10" not in {result.attention[0].query_axis, result.attention[0].key_axis}
    assert_equal(result, eager(folders["clip"], input_ids=ids, pixel_values=pixels))


def test_longformer_returns_its_band_for_any_length(client: Client, folders: dict[str, Path]) -> None:
    for length in (3, 16, 29):  # shorter than a window, a multiple of it, and neither
        ids = np.random.default_rng(length).integers(2, 99, length)
        result = client.infer("longformer", ids, attention=True)
        assert [map_.form for map_ in result.attention] == ["windowed", "windowed"]
        # A band that is no narrower than the keys is laid out over them.
        assert [map_.band is not None for map_ in result.attention] == [length > 6, length > 12]
        assert_equal(result, eager(folders["longformer"], input_ids=ids))
