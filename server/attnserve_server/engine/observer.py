"""Counts row features of served sequences: of those that select features, and of a share of the others.

A sequence that is drawn runs with the taps of its sites, whose weights are counted and dropped. Its outputs are those
of any other run, because taps are beside the graph. Weights take at most `MAX_BYTES` of a run: where the maps of all
sites of a sequence exceed what is left, some of its sites are drawn.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from attnserve_server.attention.observed import Drift, Observed, observe
from attnserve_server.domain.values import (
    Array,
    AttentionFeature,
    AttentionUnit,
    EffectiveSelection,
    HeadReduction,
    LayerReduction,
    PreparedSequence,
    SpecialTokens,
    WeightDtype,
)
from attnserve_server.engine.collation import CollatedBatch, is_finite, weights_of
from attnserve_server.model.manifest import Manifest, SiteSpec
from attnserve_server.observability.metrics import ModelMetrics
from attnserve_server.observability.spec import ATTENTION_DRIFT, ATTENTION_OBSERVED, FEATURES

_log = logging.getLogger(__name__)

MAX_BYTES: Final = 64 * 2**20
"""Most bytes of weights of drawn sequences in one run, as for the shadow check."""


class Drawn(EffectiveSelection):
    """The selection of a drawn sequence, which has no part in its answer: every head of some sites."""

    __slots__ = ()


class Observer:
    """Counts the row features of one model.

    Instances' threads draw and observe; the event loop adds what they found to metrics and drift.
    """

    def __init__(
        self,
        share: float,
        manifest: Manifest,
        metrics: ModelMetrics,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Begin.

        Args:
            share: of the sequences without selected attention, or with maps, from 0 to 1.
            manifest: of the model.
            metrics: of the model.
            draw: returns random numbers in [0, 1).
        """
        self.share = share
        self._manifest = manifest
        self._metrics = metrics.server
        self._named = manifest.name, manifest.version
        self._draw = draw
        self._sites = [site for site in manifest.sites if site.available]
        reference = manifest.reference_features
        self._drift = None if reference is None else Drift(reference)
        self._shown: set[AttentionFeature] = set()
        self.found: deque[tuple[str, list[Observed]]] = deque()
        """What instances have found, and `flush` has not added."""
        if share and self._sites and reference is None:
            _log.info(
                "no drift of attention is measured: the bundle has no reference_features",
                extra={"model": manifest.name, "version": manifest.version, "remedy": "convert the model again"},
            )

    def drawn(self, sequences: Sequence[PreparedSequence]) -> Sequence[PreparedSequence]:
        """Return the sequences of a run; some of those without selected attention select sites. Instance's thread."""
        made, left = list(sequences), MAX_BYTES
        for at, one in enumerate(sequences):
            if one.attention is not None or one.past or not self._sites or self._draw() >= self.share:
                continue
            sites, size = self._sites_within(one, left)
            if sites:
                left -= size
                made[at] = replace(one, attention=_selection(sites))
            else:
                self.found.append(("skipped", []))
        return made

    def _sites_within(self, sequence: PreparedSequence, most: int) -> tuple[list[SiteSpec], int]:
        """Return sites whose maps take at most so many bytes, and the bytes: all of them, or some at random."""
        lengths = self._manifest.with_derived(sequence.lengths)
        sizes = {site.layer: _bytes_of(site, lengths) for site in self._sites}
        chosen, total = [], 0
        everything = sum(sizes.values()) <= most
        for site in self._sites if everything else random.sample(self._sites, len(self._sites)):
            if total + sizes[site.layer] <= most:
                chosen.append(site)
                total += sizes[site.layer]
        return sorted(chosen, key=lambda site: site.layer), total

    def observe(self, batch: CollatedBatch, fetched: Mapping[str, Array], row: int, sequence: PreparedSequence) -> None:
        """Count the rows of the sequence in `row`, if it was drawn or selects features. Instance's thread.

        Arguments as for `weights_of`.
        """
        selection = sequence.attention
        if selection is None or selection.scores or sequence.past:
            return
        drawn = isinstance(selection, Drawn)
        if not drawn and not selection.features and self._draw() >= self.share:
            return
        try:
            lengths = self._manifest.with_derived(sequence.lengths)
            found = []
            for layer, weights in weights_of(batch, fetched, row, sequence, self._manifest).items():
                site = self._manifest.sites[layer]
                # A mean over heads is no row of a head.
                if len(weights) == site.heads and is_finite(weights):
                    found.append(observe(weights, site, lengths[site.query_axis], lengths[site.key_axis]))
        except Exception:  # noqa: BLE001 - the boundary of an observation: no request depends on it
            _log.exception("row features could not be counted", extra={"model": self._manifest.name})
            return
        if found:
            self.found.append(("selected" if selection.features else "sampled", found))

    def flush(self) -> None:
        """Add what was found to metrics and drift. Event loop only."""
        while self.found:
            source, found = self.found.popleft()
            self._metrics.counter(ATTENTION_OBSERVED).labels(*self._named, source).inc()
            for one in found:
                self._add(one)

    def _add(self, observed: Observed) -> None:
        for feature, (counts, total) in observed.features.items():
            series = self._metrics.histogram(FEATURES[feature]).labels(*self._named, observed.site.kind)
            series.add(counts.tolist(), total)
        drift = self._drift
        if drift is None or not drift.add(observed):
            return
        for feature in observed.features.keys() - self._shown:
            self._shown.add(feature)
            # A scrape computes it, so that a sequence costs additions only.
            self._metrics.gauge(ATTENTION_DRIFT).labels(*self._named, feature.value).set_function(
                partial(drift.of, feature)
            )


def _selection(sites: Sequence[SiteSpec]) -> Drawn:
    return Drawn(
        layers=tuple(site.layer for site in sites),
        heads=tuple(tuple(range(site.heads)) for site in sites),
        head_reduction=HeadReduction.EACH,
        layer_reduction=LayerReduction.EACH,
        queries=(),
        unit=AttentionUnit.TOKEN,
        special_tokens=SpecialTokens.KEEP,
        top_k=0,
        min_weight=0.0,
        dtype=WeightDtype.FLOAT32,
        features=(),
    )


def _bytes_of(site: SiteSpec, lengths: Mapping[str, int]) -> int:
    """Return the bytes of all weights of a site."""
    columns = site.columns if isinstance(site.columns, int) else lengths.get(site.columns, 0)
    return site.heads * lengths.get(site.query_axis, 0) * columns * 4
