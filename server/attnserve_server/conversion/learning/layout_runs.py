"""The four runs of a graph that show the layout of its weights: other batches, other lengths, another order of rows.

A layout states what each axis of a site's attention weights counts. `learning.layout` reads it from these runs. A site
is a place in a graph that computes attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.sites import Probabilities
from attnserve_server.conversion.probing.feeds import Lengths, Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.domain.values import Array

ORDER = (1, 2, 0)
"""Of the rows of a batch of three: no row stays in its place, and no two change places."""
_WINDOWS = (3, 1)
"""The widths of a window that longer sequences fill: a window spans several blocks of queries, or one."""


@dataclass(frozen=True, slots=True)
class Runs:
    """One value of the graph in four runs.

    All batches are 1, and `reordered` is None, where the graph takes no other batch.

    Attributes:
        fewer: 2 rows, at the first lengths.
        base: 3 rows, at the first lengths.
        longer: 3 rows, at the second lengths.
        reordered: the rows of `base` in the order `ORDER`.
        lengths: the first and the second lengths.
    """

    fewer: Array
    base: Array
    longer: Array
    reordered: Array | None
    lengths: tuple[Lengths, Lengths]


def run_all(
    runner: GraphRunner, sampler: Sampler, lengths: tuple[Lengths, Lengths], fetches: list[str]
) -> dict[str, Runs]:
    """Return values of a graph by name, in all four runs. Raises BuildRefused where the graph does not run."""
    fixed = sampler.signature.fixed_batch is not None
    short, long = lengths
    rows = [sampler.sequence(short, row) for row in range(1 if fixed else len(ORDER))]
    other = [sampler.sequence(long, row) for row in range(len(rows))]

    def run(batch: list[dict[str, Array]], padded: Lengths) -> dict[str, Array]:
        feeds = sampler.batch(batch, padded)
        inner = [name for name in fetches if name not in feeds]
        return {**feeds, **(runner.run(feeds, inner) if inner else {})}

    base = run(rows, short)
    longer = run(other, long) if short else base
    fewer = base if fixed else run(rows[:2], short)
    reordered = None if fixed else run([rows[row] for row in ORDER], short)
    return {
        name: Runs(fewer[name], base[name], longer[name], None if reordered is None else reordered[name], lengths)
        for name in fetches
    }


def fixed_keys(site: Probabilities, runs: Runs) -> int:
    """Return the number of keys where it is the same at both lengths; else 0."""
    if runs.base.ndim != runs.longer.ndim:
        return 0
    keys = {each.shape[site.key_axis] for each in (runs.base, runs.longer)}
    return keys.pop() if len(keys) == 1 else 0


def lengthen(runner: GraphRunner, sampler: Sampler, runs: dict[str, Runs], suspects: Mapping[str, int]) -> None:
    """Replace `longer` by longer sequences for weights with a fixed number of keys, which may be windows.

    Longer sequences are cut into several windows. Only shapes are kept, because such weights are large. `runs` is left
    unchanged where the graph takes no sequences of that length.

    Args:
        runner: the graph, as for `run_all`.
        sampler: draws sequences for it.
        runs: changed in place.
        suspects: the number of keys, by the name of the weights.
    """
    rows = sampler.signature.fixed_batch or len(ORDER)
    for windows in _WINDOWS:
        longer = {symbol: windows * max(suspects.values()) + at for at, symbol in enumerate(sampler.signature.symbols)}
        feeds = sampler.rows(longer, rows)
        with contextlib.suppress(BuildRefused):
            for name in suspects:
                shape = feeds[name].shape if name in feeds else runner.run(feeds, [name])[name].shape
                stand_in = np.broadcast_to(np.float32(0), shape)
                runs[name] = replace(runs[name], longer=stand_in, lengths=(runs[name].lengths[0], longer))
            return
