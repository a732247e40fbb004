"""Whether a graph's second axis is the batch: told by running, from which axis its answers mix along."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import onnx

from attnserve_server.conversion.learning.layout import KEYS_OF_ALL_ROWS
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.probe import max_abs, probe_lengths
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import OutputSpec, SiteSpec

_ROWS = 3
_CHANGED = 2
"""The position, along the second axis, whose content is replaced."""
_BATCH_NAME = re.compile(r"^(?:batch|b$|n$|bs$|bsz)", re.IGNORECASE)


def batch_on_axis_1(
    runner: GraphRunner,
    sampler: Sampler,
    outputs: Sequence[OutputSpec],
    sites: Sequence[SiteSpec],
    tolerance: float,
) -> tuple[str, ...]:
    """The inputs whose second axis behaves as a batch: what stands there changes no answer but its own.

    To be asked where rows along the first axis do change each other's answers. Empty where no output runs along the
    second axis, or positions along it mix as well.

    Args:
        runner: the graph.
        sampler: makes sequences for it.
        outputs: what is compared.
        sites: those that were found.
        tolerance: the greatest difference that counts as none.
    """
    firsts = {spec.name: spec.shape[0] for spec in sampler.signature.inputs if spec.shape}
    along_the_batch = any(site.unavailable_reason == KEYS_OF_ALL_ROWS for site in sites)
    if along_the_batch and firsts and all(first == 1 for first in firsts.values()):
        return tuple(firsts)  # a batch that is fixed at 1, behind a first axis that attention runs along: (S, 1, D)
    lengths, _ = probe_lengths(sampler.signature.symbols)
    for symbol in sampler.signature.symbols:
        moved = tuple(name for name, first in firsts.items() if first == symbol)
        along = [spec.name for spec in outputs if spec.shape and spec.shape[0] == symbol]
        if moved and along and _apart(runner, sampler, lengths, moved, along, tolerance):
            return moved
    return ()


def _apart(
    runner: GraphRunner,
    sampler: Sampler,
    lengths: Mapping[str, int],
    inputs: Sequence[str],
    outputs: Sequence[str],
    tolerance: float,
) -> bool:
    """Whether new content at one position of the second axis changes the outputs there, and nowhere else."""
    one, other = (
        sampler.batch([sampler.sequence(lengths, row) for row in range(first, first + _ROWS)], lengths)
        for first in (0, _ROWS)
    )
    changed = {name: _with_position(array, other[name]) if name in inputs else array for name, array in one.items()}
    before, after = (runner.run(feeds, outputs, tap=False) for feeds in (one, changed))
    own = max(max_abs(before[name][:, _CHANGED], after[name][:, _CHANGED]) for name in outputs)
    rest = max(max_abs(_without(before[name]), _without(after[name])) for name in outputs)
    return own > tolerance >= rest


def _with_position(array: Array, other: Array) -> Array:
    mixed = array.copy()
    mixed[:, _CHANGED] = other[:, _CHANGED]
    return mixed


def _without(array: Array) -> Array:
    rest = [place for place in range(array.shape[1]) if place != _CHANGED]
    return array[:, rest]


def names_the_batch_first(graph: onnx.GraphProto, names: Sequence[str]) -> bool:
    """Whether the file itself calls the first axis of all these inputs a batch."""
    firsts = [value.type.tensor_type.shape.dim[0].dim_param for value in graph.input if value.name in names]
    return all(_BATCH_NAME.match(first) for first in firsts)
