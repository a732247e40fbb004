"""The types that describe a decoder with a cache: each tensor of the cache, and the two graphs made from the source.

`conversion.caches.splitting.decoder_of` makes them. This module reads and changes no graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from attnserve_server.model.manifest import Dtype


@dataclass(frozen=True, slots=True)
class Past:
    """One tensor of a cache, as the continuing graph takes it: the keys or the values of earlier positions.

    Attributes:
        name: of the input, such as `past_key_values.0.key`.
        present: the output that has them for past and new positions together; empty if the graph returns none.
        dtype: of the input.
        shape: of the input without the batch axis, such as (kv_heads, "past_sequence_length", head_dim).
        axis: the entry of `shape` that counts positions.
        crossed: whether the tensor holds keys or values of an encoder, to which no new position is added.
    """

    name: str
    present: str
    dtype: Dtype
    shape: tuple[str | int, ...]
    axis: int
    crossed: bool = False


@dataclass(frozen=True, slots=True)
class Cache:
    """The cache of a decoder. Axis symbols are those of the continuing graph.

    Attributes:
        pasts: every tensor of the cache, in the order of the graph's inputs.
        past_axis: symbol of the past positions.
        new_axis: symbol of the positions of the ids that a request sends.
        total_axis: symbol of past and new positions together, as masks have it; empty if no input has it.
        masks: the inputs with the total axis.
        positions: the input of the new positions' indices; empty if there is none.
    """

    pasts: tuple[Past, ...]
    past_axis: str
    new_axis: str
    total_axis: str = ""
    masks: tuple[str, ...] = ()
    positions: str = ""

    @property
    def presents(self) -> tuple[str, ...]:
        """Names of the outputs that continue the cache."""
        return tuple(past.present for past in self.pasts if past.present)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A decoder's two graphs.

    Attributes:
        prompt: computes whole sequences: the source at an empty past, without the inputs of the cache.
        continuing: computes new positions behind a supplied past.
        cache: the cache that `continuing` takes and both return.
    """

    prompt: onnx.ModelProto
    continuing: onnx.ModelProto
    cache: Cache
