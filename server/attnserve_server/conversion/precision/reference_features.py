"""The distributions of a model's row features on known texts, with which a server compares those of requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from attnserve_server.attention.observed import observe
from attnserve_server.conversion.precision.comparison import Subject, answers, compared_output, groups
from attnserve_server.conversion.precision.sentences import as_inputs, sentences
from attnserve_server.domain.values import AttentionFeature
from attnserve_server.engine.session import RunFailed, RuntimeSession
from attnserve_server.model.certificate import Batching
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.report import ReferenceFeatures
from attnserve_server.model.tokenizer import TextTokenizer
from attnserve_server.observability.spec import FEATURES

MAX_TEXTS: Final = 1000
"""Texts beyond these change the distributions of a model's features by less than its drift is exact to."""
_EVERY: Final = 2
"""One sentence in so many is run, 158 in all: short, medium and long ones."""


def with_reference_features(
    manifest: Manifest,
    session: RuntimeSession,
    tokenizer: Path | None,
    batching: Batching,
    texts: Sequence[str] = (),
) -> Manifest:
    """Return the manifest with the row features of all sites on texts; as it is for a model that takes no text.

    Random inputs would be no reference: a model attends to them in another way than to text.

    Args:
        manifest: complete but for the files.
        session: the checked tapped graph, opened as the server opens it.
        tokenizer: its tokenizer.json, if it has one.
        batching: the policy by which the sequences share a batch, or not.
        texts: at most `MAX_TEXTS` of them are run, evenly chosen; empty: English sentences.

    Raises:
        TokenizerInvalid: the file is no usable tokenizer.json.
    """
    text = manifest.text
    if text is None or tokenizer is None or not any(site.available for site in manifest.sites):
        return manifest
    ruled = manifest.under(batching)
    known = TextTokenizer.load(tokenizer, text.axis, manifest.text_as_written)
    chosen = texts[:: -(-len(texts) // MAX_TEXTS)] if texts else sentences()[::_EVERY]
    sequences = as_inputs(chosen, manifest.inputs, text, known)
    subject, name = Subject(session, ruled), compared_output(ruled)
    rows: dict[str, dict[AttentionFeature, list[int]]] = {}
    try:
        for group in groups(ruled, sequences):
            for _, weights in answers(subject, group, name, tap=True):
                for layer, own in weights.items():
                    site = ruled.sites[layer]
                    keys = own.shape[2] if site.columns == site.key_axis else own.shape[1]
                    for feature, (counts, _) in observe(own, site, own.shape[1], keys).features.items():
                        sums = rows.setdefault(site.name, {}).setdefault(feature, [0] * len(counts))
                        sums[:] = [one + more for one, more in zip(sums, counts.tolist(), strict=True)]
    except RunFailed:
        return manifest  # a model that does not run on every length has no reference, and no drift
    if not rows:
        return manifest
    reference = ReferenceFeatures(
        inputs=f"{len(sequences)} {'given texts' if texts else 'English sentences'}",
        sequences=len(sequences),
        buckets={feature: spec.buckets for feature, spec in FEATURES.items()},
        sites={site: {one: tuple(counts) for one, counts in of.items()} for site, of in rows.items()},
    )
    return manifest.model_copy(update={"reference_features": reference})
