"""The values of one sequence that are compared with those of another run of it. Nothing here raises."""

from __future__ import annotations

from collections.abc import Mapping

from attnserve_server.domain.values import Array, PreparedSequence
from attnserve_server.engine.collation import CollatedBatch, outputs_of, weights_of
from attnserve_server.model.equality import values_of
from attnserve_server.model.manifest import Manifest


def compared_values(
    batch: CollatedBatch, fetched: Mapping[str, Array], row: int, sequence: PreparedSequence, manifest: Manifest
) -> dict[str, Array]:
    """Return the values of the sequence in `row` that a comparison reads, by the names that `Equality` uses.

    They are outputs, the weights of all heads, and means over heads where the sequence reads those. Views, cropped to
    its own lengths. The sequence must have `keep_values`. Arguments as for `weights_of`.
    """
    selection = sequence.attention
    read = weights_of(batch, fetched, row, sequence, manifest)
    joined = {layer for layer in read if selection is not None and manifest.sites[layer].mean_of(selection)}
    return values_of(
        outputs_of(batch, fetched, row, sequence, manifest),
        weights_of(batch, fetched, row, sequence, manifest, whole=True) if joined else read,
        manifest,
        means={layer: read[layer] for layer in joined},
        scores=selection is not None and selection.scores,
    )
