"""The runs of a graph that tell the layout of its weights: other batches, other lengths, and another order of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.sites import Probabilities
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.domain.values import Array

ORDER = (1, 2, 0)
"""Of the rows of a batch of three: no row stays in its place, nor do two change places."""
_WINDOWS = (3, 1)
"""How many widths of a window longer sequences fill: a window is of several blocks of queries, or of one."""


@dataclass(frozen=True, slots=True)
class Runs:
    """A value of the graph in runs of batch and lengths: (2, A), (3, A), (3, B), and (3, A) in another order.

    All batches are 1 where the graph takes no other; then there is nothing to put into another order.
    """

    fewer: Array
    base: Array
    longer: Array
    turned: Array | None
    lengths: tuple[Mapping[str, int], Mapping[str, int]]


def run_all(
    runner: GraphRunner, sampler: Sampler, lengths: tuple[Mapping[str, int], Mapping[str, int]], fetches: list[str]
) -> dict[str, Runs]:
    """Values of a graph by name, in all the runs. Raises BuildRefused where the graph does not run."""
    fixed = sampler.signature.fixed_batch is not None
    short, long = lengths
    rows = [sampler.sequence(short, row) for row in range(1 if fixed else len(ORDER))]
    other = [sampler.sequence(long, row) for row in range(len(rows))]

    def run(batch: list[dict[str, Array]], padded: Mapping[str, int]) -> dict[str, Array]:
        feeds = sampler.batch(batch, padded)
        inner = [name for name in fetches if name not in feeds]
        return {**feeds, **(runner.run(feeds, inner) if inner else {})}

    base = run(rows, short)
    longer = run(other, long) if short else base
    fewer = base if fixed else run(rows[:2], short)
    turned = None if fixed else run([rows[row] for row in ORDER], short)
    return {
        name: Runs(fewer[name], base[name], longer[name], None if turned is None else turned[name], lengths)
        for name in fetches
    }


def fixed_keys(probabilities: Probabilities, runs: Runs) -> int:
    """How many keys there are, where that is the same for both lengths; else 0."""
    if runs.base.ndim != runs.longer.ndim:
        return 0
    keys = {each.shape[probabilities.key_axis] for each in (runs.base, runs.longer)}
    return keys.pop() if len(keys) == 1 else 0


def lengthen(runner: GraphRunner, sampler: Sampler, runs: dict[str, Runs], suspects: Mapping[str, int]) -> None:
    """Take longer sequences for weights of as many keys at any length: those of windows are then cut into several.

    Only shapes are kept, since such weights are large. A graph that takes no sequences as long as that is left at what
    it was seen to do.

    Args:
        runner: as for `layouts_of`.
        sampler: likewise.
        runs: written to.
        suspects: how many keys there are, by the name of the weights.
    """
    rows = range(sampler.signature.fixed_batch or len(ORDER))
    for windows in _WINDOWS:
        longer = {symbol: windows * max(suspects.values()) + at for at, symbol in enumerate(sampler.signature.symbols)}
        feeds = sampler.batch([sampler.sequence(longer, row) for row in rows], longer)
        with contextlib.suppress(BuildRefused):
            for name in suspects:
                shape = feeds[name].shape if name in feeds else runner.run(feeds, [name])[name].shape
                stand_in = np.broadcast_to(np.float32(0), shape)
                runs[name] = replace(runs[name], longer=stand_in, lengths=(runs[name].lengths[0], longer))
            return
