"""The head of a manifest agrees with its outputs, and bundles without one load as before.

A head states how labels are made from a model's outputs. One that does not fit raises pydantic's ValidationError. A
bundle is the folder of one converted model.
"""

from __future__ import annotations

from typing import Any

import pytest
from attnserve_server.model.heads import EmbeddingSpec, HeadSpec
from attnserve_server.model.manifest import Manifest, OutputSpec
from pydantic import ValidationError
from tiny_bundle import tiny_manifest

LABELS = ("negative", "positive")


def with_head(head: dict[str, Any], *outputs: OutputSpec) -> Manifest:
    tiny = tiny_manifest().model_dump(mode="json")
    return Manifest.model_validate({**tiny, "head": head, "outputs": [*tiny["outputs"], *map(vars, outputs)]})


def test_a_manifest_without_a_head_loads_as_before() -> None:
    old = tiny_manifest().model_dump(mode="json", exclude={"head", "embedding"})
    for name in ("mask_token", "prompts", "default_prompt", "type_ids"):
        del old["text"][name]
    manifest = Manifest.model_validate(old)
    assert manifest.head is None
    assert manifest.text is not None
    assert manifest.text.type_ids
    assert not manifest.outputs[0].on_request


def test_a_head_reads_back_from_json() -> None:
    head = {"kind": "sequence_labels", "outputs": ["logits"], "labels": LABELS, "activation": "sigmoid"}
    manifest = with_head(head, OutputSpec(name="logits", dtype="float32", shape=(2,)))
    assert Manifest.model_validate_json(manifest.model_dump_json()).head == manifest.head


@pytest.mark.parametrize(
    ("head", "shape", "problem"),
    [
        ({"kind": "sequence_labels", "outputs": ["scores"], "labels": LABELS}, (2,), "there is no output scores"),
        ({"kind": "sequence_labels", "outputs": ["logits"], "labels": LABELS}, (3,), "3 scores for 2 labels"),
        (
            {"kind": "sequence_labels", "outputs": ["logits"], "labels": LABELS},
            ("seq", 2),
            "sequence_labels needs 1 axes",
        ),
        ({"kind": "token_labels", "outputs": ["logits"], "labels": LABELS}, (7, 2), "must be that of the tokens"),
    ],
)
def test_a_head_without_a_fitting_output_is_refused(
    head: dict[str, Any], shape: tuple[str | int, ...], problem: str
) -> None:
    with pytest.raises(ValidationError, match=problem):
        with_head(head, OutputSpec(name="logits", dtype="float32", shape=shape))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"kind": "spans", "outputs": ("logits",)}, "spans has 1 outputs; it must have 2"),
        ({"kind": "token_labels", "outputs": ("logits",)}, "token_labels has 0 labels"),
        ({"kind": "masked_tokens", "outputs": ("logits",)}, "only masked_tokens has one"),
        ({"kind": "spans", "outputs": ("a", "b"), "mask_id": 4}, "only masked_tokens has one"),
    ],
)
def test_parts_of_another_kind_are_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        HeadSpec(**fields)


def test_a_default_prompt_must_be_one_of_the_prompts() -> None:
    tiny = tiny_manifest().model_dump(mode="json")
    text = {**tiny["text"], "prompts": {"query": "q: "}, "default_prompt": "passage"}
    with pytest.raises(ValidationError, match="default_prompt 'passage' is none of the prompts"):
        Manifest.model_validate({**tiny, "text": text})


def test_sizes_of_an_embedding_are_below_its_length() -> None:
    tiny = tiny_manifest().model_dump(mode="json")
    kept = Manifest.model_validate({**tiny, "embedding": {"pooling": "mean", "sizes": [2, 4]}}).embedding
    assert kept == EmbeddingSpec(pooling="mean", sizes=(2, 4))
    for size, problem in ((8, "size 8 is not below 8, the length of output 'embedding'"), (0, "greater than or equal")):
        with pytest.raises(ValidationError, match=problem):
            Manifest.model_validate({**tiny, "embedding": {"pooling": "mean", "sizes": [size]}})
    hidden = {**tiny, "outputs": tiny["outputs"][:1], "embedding": {"pooling": "mean", "sizes": [2]}}
    with pytest.raises(ValidationError, match="sizes without an output"):
        Manifest.model_validate(hidden)
