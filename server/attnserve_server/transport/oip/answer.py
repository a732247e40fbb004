"""Results of rows to the outputs of one batch: padded with zeros to one shape, with lengths and attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from attnserve_server.domain.values import Array, AttentionMap, Links, SequenceResult
from attnserve_server.transport.oip.layout import DATATYPES, LINKS, TOP_K, Layout, Virtual, item_bytes
from attnserve_server.transport.oip.request import Read
from attnserve_server.transport.prepared import Prepared
from attnserve_server.transport.wire import dtype_name

_NO_LINK: Final = -1


@dataclass(slots=True)
class Output:
    """One output of an answer. `parts`: its data in order, C-contiguous: one array, or one for each row."""

    name: str
    datatype: str
    shape: Sequence[int]
    parts: Sequence[Array]


def outputs_of(read: Read, layout: Layout, prepared: Prepared, results: Sequence[SequenceResult]) -> list[Output]:
    """Return the outputs of a request, in its order."""
    found: list[Output] = []
    for name in read.names:
        if name in layout.outputs:
            dims = layout.outputs[name].shape
            arrays = [result.outputs[name] for result in results]
            found.append(
                _padded(name, arrays, [read.padded_to.get(one, 0) if isinstance(one, str) else 0 for one in dims])
            )
        elif name in layout.lengths:
            axis = layout.lengths[name]
            lengths = [sequence.lengths.get(axis, 0) for sequence in prepared.valid.sequences]
            found.append(Output(name, "INT64", (len(lengths),), (np.array(lengths, np.int64),)))
        elif read.virtual[name].link:
            found.append(_links_output(name, read.virtual[name], read.top_k, results))
        else:
            found.append(_map_output(name, read, results))
    return found


def _padded(name: str, arrays: Sequence[Array], least: Sequence[int]) -> Output:
    """Return one output of all rows. `least`: the least length of each axis, as the request has it."""
    first = arrays[0]
    datatype = DATATYPES[dtype_name(first.dtype)]
    shape = first.shape
    if len(arrays) == 1 and all(length >= most for length, most in zip(shape, least, strict=True)):
        return Output(name, datatype, (1, *shape), arrays)
    shape = tuple(max(most, *(array.shape[at] for array in arrays), 0) for at, most in enumerate(least))
    if all(array.shape == shape for array in arrays):
        return Output(name, datatype, (len(arrays), *shape), arrays)
    whole = np.zeros((len(arrays), *shape), first.dtype)
    for row, array in zip(whole, arrays, strict=True):
        row[tuple(map(slice, array.shape))] = array
    return Output(name, datatype, whole.shape, (whole,))


def _map_output(name: str, read: Read, results: Sequence[SequenceResult]) -> Output:
    virtual = read.virtual[name]
    maps = [_map_of(virtual, result) for result in results]
    arrays = [dense(found, result) for found, result in zip(maps, results, strict=True)]
    first = maps[0]
    least = [read.padded_to.get(first.query_axis, 0), read.padded_to.get(first.key_axis, 0)]
    if virtual.layer < 0:
        return _padded(name, [array[0] for array in arrays], least)
    return _padded(name, arrays, [0, *least])


def _map_of(virtual: Virtual, result: SequenceResult) -> AttentionMap:
    assert result.attention is not None, "attention was selected"
    return next(found for found in result.attention.maps if virtual.layer in {-1, found.layer})


def dense(found: AttentionMap, result: SequenceResult) -> Array:
    """Return the weights of a map over all keys, float32 (heads, L, S); a band is written to its keys."""
    content = found.content
    assert isinstance(content, np.ndarray), "whole maps were selected"
    if found.band_keys is None:
        return content
    assert result.attention is not None, "attention was selected"
    keys = next(units.length for units in result.attention.axes if units.axis == found.key_axis)
    whole = np.zeros((*content.shape[:2], keys), content.dtype)
    queries, columns = np.nonzero(found.band_keys >= 0)
    whole[:, queries, found.band_keys[queries, columns]] = content[:, queries, columns]
    return whole


def _links_output(name: str, virtual: Virtual, count: int, results: Sequence[SequenceResult]) -> Output:
    rows = [greatest(_map_of(virtual, result), result, count) for result in results]
    at = LINKS.index(virtual.link)
    whole = np.stack([row[at] for row in rows])
    return Output(name, DATATYPES[dtype_name(whole.dtype)], whole.shape, (whole,))


def greatest(found: AttentionMap, result: SequenceResult, count: int) -> list[Array]:
    """Return the greatest weights of a map's mean over heads: query and key (k,) int64, weight (k,) float32.

    In order of weight, then query, then key. Where a map has fewer, queries and keys are -1 and weights 0.
    """
    if isinstance(found.content, Links):
        links = found.content
        queries = np.repeat(np.arange(len(links.row_offsets) - 1), np.diff(links.row_offsets))
        keys, weights = links.keys.astype(np.int64), links.weights
    else:
        mean = dense(found, result).mean(axis=0)
        queries, keys = (each.ravel() for each in np.indices(mean.shape))
        weights = mean.ravel()
    best = np.lexsort((keys, queries, -weights))[:count]
    best_of: list[Array] = [
        np.full(count, _NO_LINK, np.int64),
        np.full(count, _NO_LINK, np.int64),
        np.zeros(count, np.float32),
    ]
    for whole, part in zip(best_of, (queries, keys, weights), strict=True):
        whole[: len(best)] = part[best]
    return best_of


def answer_bytes(read: Read, layout: Layout, prepared: Prepared) -> int:
    """Return the bytes of the tensors of an answer, with the padding of its rows, before they are computed."""
    sequences = prepared.valid.sequences
    if len(sequences) == 1 and not read.virtual:
        lengths = sequences[0].lengths
        if all(lengths.get(axis, length) == length for axis, length in read.padded_to.items()):
            return prepared.answer_bytes
    padded_to = dict(read.padded_to)
    for sequence in sequences:
        for axis, length in layout.manifest.with_derived(sequence.lengths).items():
            padded_to[axis] = max(length, padded_to.get(axis, 0))
    most = {axis.symbol: axis.max_length for axis in layout.manifest.axes} | {TOP_K: read.top_k} | padded_to
    row = 0
    for tensor in layout.tensors_out():
        if tensor.name in read.names:
            dims = [one if isinstance(one, int) else most.get(one, 1) for one in tensor.dims]
            row += math.prod(dims) * item_bytes(tensor.datatype)
    return row * len(sequences)
