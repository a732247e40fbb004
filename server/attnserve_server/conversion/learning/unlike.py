"""Why a graph does not run on the shapes that probes try: asked only once it has failed, and answered by running it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.reading import save
from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.probe import probe_lengths
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.domain.values import Array

BATCH_FIRST: Final = (
    "attnserve needs the batch as the first axis of every input: export the model again with it in front "
    "(in torch, batch_first=True), or transpose its inputs and outputs in the graph"
)
"""The remedy for a graph whose batch is its second axis."""
_PROBED_ROWS: Final = 3
"""The greatest batch that probes run."""
_MOST_MULTIPLE: Final = 64
_MOST_SWAPPED: Final = 4
"""Inputs of two axes or more that are tried with their first two axes swapped."""
_ROWS, _LENGTH = 2, 5


def takes_one_row_alone(proto: onnx.ModelProto, signature: Signature, work: Path) -> bool:
    """Whether a graph runs on one row, and not on as many as probes take, or answers one row whatever it is given.

    False where the probes failed on something else.

    Args:
        proto: the graph, on which the probes failed.
        signature: of the graph.
        work: a folder for a file.

    Raises:
        BuildRefused: the graph takes only lengths that are multiples of a number, or has its batch on its second axis;
            the message says so and gives the remedy.
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
        return _of_one_row(runner, signature)
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


def _of_one_row(runner: GraphRunner, signature: Signature) -> bool:
    """Whether all outputs have one row for a batch of several.

    Raises:
        BuildRefused: all outputs are, at two lengths, as long as the inputs' second axis in the place of the batch.
    """
    seen = [(lengths, _first_extents(runner, signature, lengths)) for lengths in probe_lengths(signature.symbols)]
    firsts = {spec.name: spec.shape[0] for spec in signature.inputs if spec.shape}
    for symbol in signature.symbols:
        inputs = [name for name, first in firsts.items() if first == symbol]
        if inputs and all(extents == {lengths[symbol]} for lengths, extents in seen):
            raise BuildRefused(
                f"the batch may be axis 1 of {', '.join(map(repr, inputs))}: every output has that axis in front, and "
                f"none has axis 0 there; {BATCH_FIRST}"
            )
    return all(extents == {1} for _, extents in seen)


def _first_extents(runner: GraphRunner, signature: Signature, lengths: Mapping[str, int]) -> set[int]:
    """Of all outputs."""
    sampler = Sampler(signature)
    feeds = sampler.batch([sampler.sequence(lengths, row) for row in range(_PROBED_ROWS)], lengths)
    return {array.shape[0] if array.ndim else 0 for array in runner.run(feeds, runner.output_names).values()}


def _runs(runner: GraphRunner, signature: Signature, lengths: Mapping[str, int], rows: int) -> bool:
    sampler = Sampler(signature)
    return _takes(runner, sampler.batch([sampler.sequence(lengths, row) for row in range(rows)], lengths))


def _takes(runner: GraphRunner, feeds: Mapping[str, Array]) -> bool:
    try:
        runner.run(feeds, runner.output_names)
    except BuildRefused:
        return False
    return True


def _multiple(runner: GraphRunner, signature: Signature) -> int:
    """The least number of whose multiples alone the lengths may be; 0 where there is none."""
    if not signature.symbols or signature.fixed_batch:
        return 0
    if all(_runs(runner, signature, dict.fromkeys(signature.symbols, length), 1) for length in (_LENGTH, _LENGTH + 2)):
        return 0  # any lengths will do, as long as they are equal
    for multiple in range(2, _MOST_MULTIPLE + 1):
        several = [dict.fromkeys(signature.symbols, times * multiple) for times in (1, 2, 3)]
        if all(_runs(runner, signature, lengths, _PROBED_ROWS) for lengths in several):
            return multiple
    return 0


def _swapped(runner: GraphRunner, signature: Signature) -> tuple[str, ...]:
    """The inputs that must have their first two axes swapped for the graph to run; empty where that does not help."""
    eligible = [spec.name for spec in signature.inputs if spec.shape and not isinstance(spec.shape[0], int)]
    sampler = Sampler(signature)
    lengths = dict.fromkeys(signature.symbols, _LENGTH)
    feeds = sampler.batch([sampler.sequence(lengths, row) for row in range(_ROWS)], lengths)
    for names in _subsets(eligible):
        tried = {name: np.swapaxes(array, 0, 1) if name in names else array for name, array in feeds.items()}
        if _takes(runner, {name: np.ascontiguousarray(array) for name, array in tried.items()}):
            return names
    return ()


def _subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Some of the inputs, and not all: with all of them swapped, only rows and lengths would be others."""
    few = names[:_MOST_SWAPPED]
    counts = range(1, min(len(few) + 1, len(names)))
    return [subset for count in counts for subset in itertools.combinations(few, count)]
