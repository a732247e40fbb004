"""Compares what a tapped graph answers with what its source answers: outputs, and the weights of every site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnserve_server.attention.bands import band_keys, lay_out
from attnserve_server.conversion.base.errors import CheckFailed
from attnserve_server.conversion.base.tolerances import row_sum_error
from attnserve_server.conversion.probing.probe import croppers, max_abs
from attnserve_server.conversion.sources.source_model import Reference
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import OutputSpec, SiteSpec


@dataclass(frozen=True, slots=True)
class Differences:
    """The greatest absolute difference of outputs, of weights, and of a row of weights' sum from 1."""

    output: float
    weight: float
    row_sum: float


def differences(
    outputs: Sequence[OutputSpec],
    sites: Sequence[SiteSpec],
    found: Mapping[str, Array],
    reference: Reference,
    lengths: Sequence[Mapping[str, int]],
) -> Differences:
    """Compare one padded batch, of which each sequence's own part counts.

    Args:
        outputs: those that are compared; one that the source does not give is left out.
        sites: all sites, in order; those that give no weights, and those whose weights the source does not give, are
            left out.
        found: the graph's outputs and weights, by their names, (B, ...) each.
        reference: the source's answers to the same batch.
        lengths: of each sequence, by axis symbol: dynamic and derived axes, and fixed ones too.

    Raises:
        CheckFailed: the source has another number of sites.
    """
    if len(reference.weights) != len(sites):
        raise CheckFailed(
            f"check failed: {len(sites)} sites in the graph, but the source gives {len(reference.weights)} attention "
            "tensors; no bundle was written"
        )
    output = weight = row_sum = 0.0
    for row, own in enumerate(lengths):
        crops = croppers(outputs, {}, own)
        for name, crop in crops.items():
            if name in reference.outputs:
                output = max(output, max_abs(crop(found[name][row]), crop(reference.outputs[name][row])))
        for site in sites:
            expected = reference.weights[site.layer]
            if site.weights_output is None or expected is None:
                continue
            queries, keys = own[site.query_axis], own[site.key_axis]
            weights = over_keys(site, found[site.weights_output][row], queries, keys)
            weight = max(weight, max_abs(weights, expected[row][:, :queries, :keys]))
            row_sum = max(row_sum, row_sum_error(weights))
    return Differences(output, weight, row_sum)


def over_keys(site: SiteSpec, weights: Array, queries: int, keys: int) -> Array:
    """One sequence's weights without its padding, (H, L, S); those of a windowed site stand where their keys do.

    Args:
        site: whose weights they are.
        weights: (H, L or more, S or more), or (H, L or more, columns of the band).
        queries: L.
        keys: S.
    """
    own = weights[:, :queries]
    if site.band is None or site.whole_rows:
        return own[:, :, :keys]
    return lay_out(own, band_keys(site.band, queries, keys), keys)
