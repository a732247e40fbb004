"""Finds graphs whose batch is not a dynamic first axis, and graphs that take only some lengths, by running them.

    takes_one_row_alone   after the probes failed: the graph runs on one row only, or answers one row only
    batch_on_axis_1       after rows changed each other's answers: the second axis behaves as the batch

Both raise or report what the user must change in the graph.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.tolerances import max_abs
from attnserve_server.conversion.graphs.reading import save
from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.conversion.learning.layout import KEYS_OF_ALL_ROWS
from attnserve_server.conversion.probing.feeds import Lengths, Sampler, probe_lengths
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import OutputSpec, SiteSpec

BATCH_FIRST: Final = (
    "attnserve needs the batch as the first axis of every input: export the model again with it in front "
    "(in torch, batch_first=True), or transpose its inputs and outputs in the graph"
)
"""The remedy for a graph whose batch is its second axis."""
_PROBED_ROWS: Final = 3
"""The greatest batch that probes run."""
_MOST_MULTIPLE: Final = 64
_MOST_SWAPPED: Final = 4
"""The most inputs of two axes or more that are tried with their first two axes swapped."""
_ROWS, _LENGTH = 2, 5
_CHANGED = 2
"""The position along the second axis whose content is replaced."""
_BATCH_NAME = re.compile(r"^(?:batch|b$|n$|bs$|bsz)", re.IGNORECASE)


def takes_one_row_alone(proto: onnx.ModelProto, signature: Signature, work: Path) -> bool:
    """Whether a graph runs on one row and not on as many as probes take, or answers one row for a batch of several.

    False where the probes failed for another reason.

    Args:
        proto: the graph, on which the probes failed.
        signature: of the graph.
        work: a folder for a file.

    Raises:
        BuildRefused: the graph takes only lengths that are multiples of a number, has its batch on its second axis, or
            cannot be loaded.
    """
    path = work / "unlike.onnx"
    save(ir.from_proto(proto), path)
    runner = GraphRunner(path)
    for lengths in probe_lengths(signature.symbols):
        if not _runs(runner, signature, lengths, 1):
            break
    else:
        if not _runs(runner, signature, lengths, _PROBED_ROWS):
            return True
        return _answers_one_row(runner, signature)
    multiple = _multiple(runner, signature)
    if multiple:
        axes = " and ".join(repr(symbol) for symbol in signature.symbols)
        raise BuildRefused(
            f"the model runs only on lengths that are multiples of {multiple} along {axes}, and sequences have any "
            f"length: export it so that it pads its input to a multiple of {multiple} itself, or with a fixed length"
        )
    swapped = _swapped(runner, signature)
    if swapped:
        raise BuildRefused(
            f"the batch may be axis 1 of {', '.join(map(repr, swapped))}: the model runs with these axes swapped, and "
            f"not as they stand; {BATCH_FIRST}"
        )
    return False


def _answers_one_row(runner: GraphRunner, signature: Signature) -> bool:
    """Whether all outputs have one row for a batch of several.

    Raises:
        BuildRefused: the first axis of all outputs is, at two lengths, as long as the inputs' second axis.
    """
    runs = [(lengths, _first_sizes(runner, signature, lengths)) for lengths in probe_lengths(signature.symbols)]
    firsts = {spec.name: spec.shape[0] for spec in signature.inputs if spec.shape}
    for symbol in signature.symbols:
        inputs = [name for name, first in firsts.items() if first == symbol]
        if inputs and all(sizes == {lengths[symbol]} for lengths, sizes in runs):
            raise BuildRefused(
                f"the batch may be axis 1 of {', '.join(map(repr, inputs))}: every output has that axis in front, and "
                f"none has axis 0 there; {BATCH_FIRST}"
            )
    return all(sizes == {1} for _, sizes in runs)


def _first_sizes(runner: GraphRunner, signature: Signature, lengths: Lengths) -> set[int]:
    """Return the sizes of all outputs' first axes; 0 for an output without axes."""
    feeds = Sampler(signature).rows(lengths, _PROBED_ROWS)
    return {array.shape[0] if array.ndim else 0 for array in runner.run(feeds, runner.output_names).values()}


def _runs(runner: GraphRunner, signature: Signature, lengths: Lengths, rows: int) -> bool:
    return _takes(runner, Sampler(signature).rows(lengths, rows))


def _takes(runner: GraphRunner, feeds: Mapping[str, Array]) -> bool:
    try:
        runner.run(feeds, runner.output_names)
    except BuildRefused:
        return False
    return True


def _multiple(runner: GraphRunner, signature: Signature) -> int:
    """Return the least number of which all lengths must be multiples; 0 where there is none."""
    if not signature.symbols or signature.fixed_batch:
        return 0
    if all(_runs(runner, signature, dict.fromkeys(signature.symbols, length), 1) for length in (_LENGTH, _LENGTH + 2)):
        return 0  # the graph runs on any lengths that are equal
    for multiple in range(2, _MOST_MULTIPLE + 1):
        several = [dict.fromkeys(signature.symbols, times * multiple) for times in (1, 2, 3)]
        if all(_runs(runner, signature, lengths, _PROBED_ROWS) for lengths in several):
            return multiple
    return 0


def _swapped(runner: GraphRunner, signature: Signature) -> tuple[str, ...]:
    """Return the inputs with which the graph runs once their first two axes are swapped; empty where none help."""
    eligible = [spec.name for spec in signature.inputs if spec.shape and not isinstance(spec.shape[0], int)]
    feeds = Sampler(signature).rows(dict.fromkeys(signature.symbols, _LENGTH), _ROWS)
    for names in _subsets(eligible):
        tried = {name: np.swapaxes(array, 0, 1) if name in names else array for name, array in feeds.items()}
        if _takes(runner, {name: np.ascontiguousarray(array) for name, array in tried.items()}):
            return names
    return ()


def _subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the proper subsets of the first inputs: swapping all of them would only exchange rows and lengths."""
    few = names[:_MOST_SWAPPED]
    counts = range(1, min(len(few) + 1, len(names)))
    return [subset for count in counts for subset in itertools.combinations(few, count)]


def batch_on_axis_1(
    runner: GraphRunner,
    sampler: Sampler,
    outputs: Sequence[OutputSpec],
    sites: Sequence[SiteSpec],
    tolerance: float,
) -> tuple[str, ...]:
    """Return the inputs whose second axis behaves as a batch: content at one position changes the answer there alone.

    For graphs in which rows along the first axis change each other's answers.

    Args:
        runner: the graph.
        sampler: draws sequences for it.
        outputs: the outputs that are compared.
        sites: all sites.
        tolerance: the greatest difference that counts as none.

    Returns:
        Names of inputs; empty where no output runs along the second axis, or positions along it change each other too.

    Raises:
        BuildRefused: the graph does not run.
    """
    firsts = {spec.name: spec.shape[0] for spec in sampler.signature.inputs if spec.shape}
    along_the_batch = any(site.unavailable_reason == KEYS_OF_ALL_ROWS for site in sites)
    if along_the_batch and firsts and all(first == 1 for first in firsts.values()):
        return tuple(firsts)  # (S, 1, D): a batch fixed at 1, behind a first axis that attention runs along
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
    lengths: Lengths,
    inputs: Sequence[str],
    outputs: Sequence[str],
    tolerance: float,
) -> bool:
    """Whether new content at one position of the second axis changes the outputs there, and nowhere else."""
    one, other = (sampler.rows(lengths, _PROBED_ROWS, first) for first in (0, _PROBED_ROWS))
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
    """Whether the file names the first axis of all these inputs as a batch."""
    firsts = [value.type.tensor_type.shape.dim[0].dim_param for value in graph.input if value.name in names]
    return all(_BATCH_NAME.match(first) for first in firsts)
