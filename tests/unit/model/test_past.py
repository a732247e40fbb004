"""The past in a manifest: it agrees with the prompt graph, and gives the manifest of the continuing graph.

A decoder with a cache has two graphs: for whole sequences, and for new positions after a past. A past that does not fit
raises pydantic's ValidationError, and a changed file of the graph BundleInvalid.
"""

from __future__ import annotations

from typing import Any

import pytest
from attnserve_server.model.bands import SlidingBand
from attnserve_server.model.holding import verify
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.past import PastSpec
from attnserve_server.model.repository import MODEL_FILE, BundleInvalid, Repository, write_bundle
from made_by_hand import certificate
from past_graphs import MAX_LENGTH, PASTS, PRESENTS, manifest, write_files
from pydantic import ValidationError
from tiny_bundle import tiny_manifest

MANIFEST = manifest()
PAST = MANIFEST.past
assert PAST is not None


def changed(**fields: Any) -> Manifest:
    """The manifest with these fields of its past changed, checked again."""
    return Manifest.model_validate({**MANIFEST.model_dump(), "past": {**PAST.model_dump(), **fields}})


def test_the_continuing_graph_has_the_axes_of_past_new_and_all_positions() -> None:
    continuing = MANIFEST.continuing
    assert continuing is not None
    assert continuing.past is None
    assert [(axis.symbol, axis.max_length, axis.paddable) for axis in continuing.axes] == [
        ("seq", MAX_LENGTH - 1, False),
        ("past", MAX_LENGTH - 1, False),
        ("past+seq", MAX_LENGTH, False),
    ]
    assert continuing.with_derived({"seq": 2, "past": 5}) == {"seq": 2, "past": 5, "past+seq": 7}
    assert continuing.with_derived({"seq": 2}) == {"seq": 2}
    assert [spec.name for spec in continuing.inputs] == ["input_ids", "attention_mask", "position_ids", *PASTS]
    assert {(site.query_axis, site.key_axis) for site in continuing.sites} == {("seq", "past+seq")}
    assert continuing.output("logits").on_request is False
    assert all(continuing.output(name).on_request for name in PRESENTS)


def test_a_site_whose_scores_the_prompt_graph_alone_computes_refuses_them_after_a_past() -> None:
    sites = [site.model_copy(update={"scores_output": f"attention_scores.{site.name}"}) for site in MANIFEST.sites]
    past = PAST.model_copy(update={"without_scores": (sites[1].name,)})
    continuing = MANIFEST.model_copy(update={"sites": tuple(sites), "past": past}).continuing
    assert continuing is not None
    first, second, *_ = continuing.sites
    assert (first.scores_output, first.why_no_scores) == (sites[0].scores_output, "")
    assert second.scores_output is None
    assert second.why_no_scores == "its graph for sequences with a past does not compute scores that can be returned"


def test_a_band_of_whole_rows_becomes_rows_over_all_keys() -> None:
    site = MANIFEST.sites[0].model_copy(
        update={"form": "windowed", "band": SlidingBand(before=2, after=0), "whole_rows": True}
    )
    windowed = MANIFEST.model_copy(update={"sites": (site, *MANIFEST.sites[1:])})
    assert windowed.continuing is not None
    assert (windowed.continuing.sites[0].form, windowed.continuing.sites[0].band) == ("windowed", None)
    with pytest.raises(ValidationError, match="layer0 are a band, which a past would move"):
        Manifest.model_validate(
            {**MANIFEST.model_dump(), "sites": [{**site.model_dump(), "whole_rows": False}, *MANIFEST.sites[1:]]}
        )


def test_the_policy_and_the_certificate_of_the_continuing_graph_decide_who_shares_its_runs() -> None:
    def shared(one: Manifest, batching: Any) -> tuple[int, bool, bool]:
        continuing = one.under(batching).continuing
        assert continuing is not None
        return continuing.max_batch_size, continuing.axis("seq").paddable, continuing.axis("past").paddable

    assert shared(MANIFEST, "proved") == (8, True, False)
    assert shared(MANIFEST, "off") == (1, False, False)
    assert shared(manifest(batched=False), "proved") == (1, False, False)
    unknown = PAST.model_copy(update={"certificate": certificate(batch="proved", seq="unknown")})
    assert shared(MANIFEST.model_copy(update={"past": unknown}), "proved") == (8, False, False)


def test_a_past_that_contradicts_the_prompt_graph_is_refused() -> None:
    caches = [cache.model_dump() for cache in PAST.caches]
    for fields, why in (
        ({"axis": "seq"}, "must be three symbols"),
        ({"follows": "other"}, "other is not a given axis of variable length"),
        ({"inputs": ()}, None),
        ({"inputs": (PAST.inputs[0], PAST.inputs[0])}, r"input names are used twice: \['input_ids'\]"),
        ({"axis": "elsewhere"}, "no cache input has axis elsewhere"),
        ({"key_axis": "elsewhere"}, r"axis symbols \['past\+seq'\] are not declared"),
        ({"outputs": PAST.outputs[1:]}, r"\['logits'\] are not outputs after a past"),
        ({"caches": [{**caches[0], "present": "other"}, *caches[1:]]}, r"\['other'\] continue cache inputs"),
        ({"certificate": certificate(batch="proved")}, "its certificate needs clauses for batch and seq"),
    ):
        if why is None:
            assert changed(**fields).past is not None
            continue
        with pytest.raises(ValidationError, match=why):
            changed(**fields)
    short = [{**MANIFEST.axes[0].model_dump(), "max_length": 1}]
    with pytest.raises(ValidationError, match="no room for a past and a new position"):
        Manifest.model_validate({**MANIFEST.model_dump(), "axes": short, "text": None})


def test_manifests_without_a_past_stay_as_they_are() -> None:
    assert tiny_manifest().continuing is None
    stored = tiny_manifest().model_dump(mode="json")
    del stored["past"]
    assert Manifest.model_validate(stored) == tiny_manifest()
    assert isinstance(changed().past, PastSpec)


def test_the_continuing_graph_is_verified_like_every_file(tmp_path: Any) -> None:
    (tmp_path / "work").mkdir()
    files = write_files(tmp_path / "work")
    bundle = write_bundle(tmp_path / "models", MANIFEST, files)
    verify(bundle)
    read = Repository(tmp_path / "models").bundle("decoder")
    assert read.continuing is not None
    assert (read.graph, read.continuing.graph) == (MODEL_FILE, "past.onnx")
    assert read.continuing.model_path.exists()
    without = write_bundle(tmp_path / "others", MANIFEST, {MODEL_FILE: files[MODEL_FILE]})
    with pytest.raises(BundleInvalid, match=r"past.onnx is not listed in manifest.json"):
        verify(without)
    (bundle.path / "past.onnx").write_bytes(b"changed")
    with pytest.raises(BundleInvalid, match="sha256"):
        verify(bundle)
