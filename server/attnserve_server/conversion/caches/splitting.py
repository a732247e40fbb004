"""Split a decoder with a cache into the graph of whole sequences and the graph behind a supplied past: `decoder_of`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.caches.decoder import Cache, Decoder, Past
from attnserve_server.conversion.caches.finding import FoundPast, find_pasts
from attnserve_server.conversion.caches.folded import folded_heads, unfold
from attnserve_server.conversion.caches.head_sizes import state_sizes
from attnserve_server.conversion.caches.merged import branches_of
from attnserve_server.conversion.caches.prompt import without_past
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.inputs.roles import is_position, plain_name
from attnserve_server.conversion.inputs.signature import SEQUENCE, dtype_of

_NAMED = re.compile(r"past(?:_key_values)?", re.IGNORECASE)
PAST = "past"
"""The symbol of past positions, where the graph has none."""


def decoder_of(proto: onnx.ModelProto, name: str) -> Decoder | None:
    """Return the two graphs of a decoder with a cache; None for any other graph.

    Args:
        proto: the graph, with inferred shapes.
        name: of the file, for messages.

    Raises:
        BuildRefused: the cache is recognised, and the graph cannot compute whole sequences. It needs an encoder's keys,
            for example.
    """
    branches = branches_of(proto)
    if branches is not None:
        return _of_branches(*branches, name)
    model = ir.from_proto(proto)
    pasts = find_pasts(model.graph)
    if not pasts:
        return None
    crossed = next((past for past in pasts if past.crossed), None)
    if crossed is not None:
        raise BuildRefused(
            f"input {crossed.value.name!r} holds keys or values of an encoder, which an empty past has none of: "
            "prepare the file that computes them, such as decoder_model.onnx, or the merged file"
        )
    if state_sizes(pasts):
        proto = checked(ir.to_proto(model), name)
    cache = _cache(model.graph, pasts)
    if any(len(one.shape) == len(past.value.shape or ()) for one, past in zip(cache.pasts, pasts, strict=True)):
        continuing = ir.from_proto(proto)
        unfold(continuing.graph, find_pasts(continuing.graph))
        proto = checked(ir.to_proto(continuing), name)
    without_past(model, pasts)
    _rename(model.graph, {cache.total_axis: cache.new_axis})
    return Decoder(checked(ir.to_proto(model), name), proto, cache)


def _of_branches(prompt: ir.Model, continuing: ir.Model, name: str) -> Decoder | None:
    """Return the decoder of a merged file, of which one branch takes a cache and the other computes whole sequences."""
    pasts = find_pasts(continuing.graph)
    if not pasts:
        return None
    state_sizes(pasts)
    cache = _cache(continuing.graph, pasts)
    unfold(continuing.graph, pasts)
    crossed = {past.present for past in cache.pasts if past.crossed}
    for value in [value for value in continuing.graph.outputs if value.name in crossed]:
        continuing.graph.outputs.remove(value)  # a constant in the place of the encoder's keys and values
    without_past(prompt, find_pasts(prompt.graph))
    _rename(prompt.graph, {cache.total_axis: cache.new_axis})
    return Decoder(checked(ir.to_proto(prompt), name), checked(ir.to_proto(continuing), name), cache)


def whole_sequences(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Return the graph of whole sequences: of a decoder with a cache the prompt graph, else the graph itself.

    Args:
        proto: the graph, with inferred shapes.
        name: of the file, for messages.

    Raises:
        BuildRefused: as `decoder_of`.
    """
    decoder = decoder_of(proto, name)
    return proto if decoder is None else decoder.prompt


def _cache(graph: ir.Graph, pasts: Sequence[FoundPast]) -> Cache:
    """Describe the cache, and find the axes that the positions of past and new tokens have."""
    names = {past.value.name for past in pasts}
    others = [value for value in graph.inputs if value.name not in names and value.const_value is None]
    first = next(past for past in pasts if not past.crossed)
    past_axis = _symbol(first.value, first.axis) or PAST
    totals = {_symbol(past.present, past.axis): None for past in pasts if past.present is not None}
    totals |= {symbol: None for value in others for symbol in _symbols(value) if past_axis in _terms(symbol)}
    masks = [value for value in others if any(symbol in totals for symbol in _symbols(value))]
    total = next((symbol for value in masks for symbol in _symbols(value) if symbol in totals), "")
    terms = [term for term in _terms(total) if term != past_axis]
    new = terms[0] if len(_terms(total)) == 2 and len(terms) == 1 else _new_axis(others, masks)
    return Cache(
        pasts=tuple(_described(past, folded_heads(past, others[0]) if others else 0) for past in pasts),
        past_axis=past_axis,
        new_axis=new,
        total_axis=total,
        masks=tuple(str(value.name) for value in masks),
        positions=next((str(value.name) for value in others if is_position(str(value.name))), ""),
    )


def _described(past: FoundPast, heads: int) -> Past:
    """Describe one tensor of a cache; `heads`: those that its batch axis carries too."""
    value = past.value
    assert value.shape is not None
    assert value.dtype is not None
    name = str(value.name)
    sizes = tuple(
        size if isinstance(size, int) else size.value or (PAST if axis == past.axis else f"{name}_axis_{axis}")
        for axis, size in enumerate(value.shape)
    )[1:]
    return Past(
        name=name,
        present=str(past.present.name) if past.present is not None else _NAMED.sub("present", name) * past.crossed,
        dtype=dtype_of(value.dtype.value, name),
        shape=(heads, *sizes) if heads else sizes,
        axis=past.axis if heads else past.axis - 1,
        crossed=past.crossed,
    )


def _new_axis(others: Sequence[ir.Value], masks: Sequence[ir.Value]) -> str:
    """Return the axis of new positions: that of the ids, or of the first input with a second axis."""
    along = [value for value in others if value not in masks and value.shape is not None and len(value.shape) > 1]
    along.sort(key=lambda value: plain_name(str(value.name)) != "input_ids")
    return (_symbol(along[0], 1) if along else "") or SEQUENCE


def _terms(symbol: str) -> list[str]:
    """Return the symbols that an axis name such as "past_sequence_length + sequence_length" is the sum of."""
    return [term.strip() for term in symbol.split("+")]


def _symbols(value: ir.Value) -> list[str]:
    return [] if value.shape is None else [_symbol(value, axis) for axis in range(1, len(value.shape))]


def _symbol(value: ir.Value, axis: int) -> str:
    """Return the symbol of an axis; empty for a nameless one and for a number."""
    size = value.shape[axis] if value.shape is not None and axis < len(value.shape) else None
    return size.value or "" if isinstance(size, ir.SymbolicDim) else ""


def _rename(graph: ir.Graph, symbols: Mapping[str, str]) -> None:
    """Rename axes wherever the graph states them."""
    values = [*graph.inputs, *(output for node in graph.all_nodes() for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            sizes = [
                symbols.get(size.value or "", size) if isinstance(size, ir.SymbolicDim) else size
                for size in value.shape
            ]
            value.shape = ir.Shape(sizes)
