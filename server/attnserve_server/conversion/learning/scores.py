"""Compares the softmax of each site's scores with its weights, and states why a site gives no scores.

It runs the graph with taps, the nodes that return a site's weights and its scores (what softmax takes) as outputs. A
site whose scores do not give its weights still gives these. A tap that does not run is a reason, too; a graph with more
axes than there are lengths to try raises BuildRefused. A site is a place in a graph that computes attention.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.sites import FoundSite, Linear, Probabilities, Recurrent, Scores
from attnserve_server.conversion.probing.feeds import Sampler, probe_lengths
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.rewrite.taps import SCORES_PREFIX, WEIGHTS_PREFIX
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import LOWEST_SCORE


def scoreless_sites(
    checker: GraphRunner, sampler: Sampler, found: Mapping[str, FoundSite], tolerance: float
) -> dict[str, str]:
    """Return why each site that gives weights gives no scores; without the sites that give them.

    Args:
        checker: the graph with taps.
        sampler: draws sequences for it.
        found: all sites.
        tolerance: the greatest difference between the softmax of the scores and the weights.
    """
    lengths, _ = probe_lengths(sampler.signature.symbols)
    feeds = sampler.rows(lengths, sampler.signature.fixed_batch or 3)
    reasons: dict[str, str] = {}
    for name, site in found.items():
        match site.attention:
            case Linear() | Recurrent():
                reasons[name] = "it is linear attention, whose weights are no softmax of scores"
            case Probabilities():
                reasons[name] = "its softmax is in plain nodes, where the mask is part of what softmax reads"
            case Scores():
                try:
                    arrays = checker.run(feeds, [WEIGHTS_PREFIX + name, SCORES_PREFIX + name])
                except BuildRefused as fault:
                    reasons[name] = f"its tap does not run: {fault}"
                    continue
                error = softmax_error(arrays[SCORES_PREFIX + name], arrays[WEIGHTS_PREFIX + name])
                if not error <= tolerance:
                    reasons[name] = f"the softmax of its scores differs from its weights by {error:.3g}"
    return reasons


def softmax_error(scores: Array, weights: Array) -> float:
    """Return the greatest difference between the softmax of scores and weights, in rows with a visible key.

    Each softmax is scaled to the sum of its row of weights, because a sink takes a share that no key has.

    Args:
        scores: as the tap writes them, (B, H, L, S).
        weights: of the same shape.
    """
    shown = np.where(scores <= LOWEST_SCORE, -np.inf, scores.astype(np.float64))
    visible = np.isfinite(shown).any(axis=-1)
    rows, expected = shown[visible], weights[visible].astype(np.float64)
    exponentials = np.exp(rows - rows.max(axis=-1, keepdims=True, initial=LOWEST_SCORE))
    softmax = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return float(np.abs(softmax * expected.sum(axis=-1, keepdims=True) - expected).max(initial=0.0))
