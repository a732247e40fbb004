"""The tensors of a model: its inputs and outputs, and the past that its sequences may have.

A past is the keys and values that a decoder computed for earlier positions. Decoding does not fail: an element type
that this client does not know becomes `unspecified`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnserve.v1 import model_pb2

from attnserve_client._tensors import Array, dtype_name


@dataclass(frozen=True, slots=True)
class IndexRange:
    """The range of an input that the model uses as indices into a table.

    Attributes:
        least: Least legal value; with `along`, it counts from minus the length of that axis.
        greatest: Greatest legal value; with `along`, it counts from the length of that axis.
        column: Position along the input's last axis to which the range applies; None for every element.
        along: Symbol of the axis whose positions are the table; empty for a table of fixed size.
    """

    least: int
    greatest: int
    column: int | None = None
    along: str = ""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output.

    Attributes:
        name: Its name.
        dtype: NumPy name of its element type.
        shape: An axis symbol or a fixed length for each axis, without the batch axis.
        optional: Whether callers may omit the input.
        vocabulary_size: Number of token ids of an input of ids, which must be below it; 0 if unknown.
        index_ranges: Ranges of any other input that the model uses as indices; empty if all values are legal.
        additive_mask: Whether the input is added to attention scores, so that it may hold -inf to hide a key.
        on_request: Of an output: whether it is returned only to requests that name it.
    """

    name: str
    dtype: str
    shape: tuple[str | int, ...]
    optional: bool = False
    vocabulary_size: int = 0
    index_ranges: tuple[IndexRange, ...] = ()
    additive_mask: bool = False
    on_request: bool = False


@dataclass(frozen=True, slots=True)
class Cache:
    """One input for the past of a decoder with a cache.

    Attributes:
        input: The input, for example of shape (kv_heads, "past", head_dim).
        present: Name of the output whose value the input has in the next call; empty if there is none.
    """

    input: TensorSpec
    present: str


@dataclass(frozen=True, slots=True)
class Past:
    """The past that sequences of a decoder with a cache may have: `Continuation` passes it.

    Attributes:
        axis: Axis symbol of the past positions.
        new_axis: Axis symbol of the new positions, which are the queries of maps.
        key_axis: Axis symbol of past and new positions, which are the keys of maps. There are at most as many of them
            as the greatest length of `new_axis`.
        caches: The inputs for the past; a sequence has all of them.
        inputs: The other inputs of a sequence with a past.
        outputs: The outputs of a sequence with a past.
        batched: Whether sequences with pasts of equal lengths share runs.
        paddable: Whether those of different new lengths do, too.
    """

    axis: str
    new_axis: str
    key_axis: str
    caches: tuple[Cache, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool
    paddable: bool

    @property
    def presents(self) -> tuple[str, ...]:
        """Names of the outputs that a call must select, so that another can continue it."""
        return tuple(cache.present for cache in self.caches if cache.present)

    def after(self, outputs: Mapping[str, Array], before: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Return the past of the next call.

        Args:
            outputs: Those of the last call, with `presents`.
            before: The past of the last call, from which inputs that do not change are taken; None if it had none.

        Raises:
            KeyError: An output is missing, or an input that does not change.
        """
        kept = before or {}
        return {
            cache.input.name: outputs[cache.present] if cache.present in outputs else kept[cache.input.name]
            for cache in self.caches
        }


def spec_of(message: model_pb2.TensorSpec) -> TensorSpec:
    """Return the input or output in a message."""
    shape = tuple(each.symbol if each.WhichOneof("length") == "symbol" else each.size for each in message.shape)
    ranges = tuple(
        IndexRange(each.least, each.greatest, each.column if each.HasField("column") else None, each.along)
        for each in message.index_ranges
    )
    return TensorSpec(
        message.name,
        dtype_name(message.dtype),
        shape,
        message.optional,
        message.vocabulary_size,
        ranges,
        message.additive_mask,
        message.on_request,
    )


def past_of(message: model_pb2.Past) -> Past:
    """Return the past in a message."""
    return Past(
        axis=message.axis,
        new_axis=message.new_axis,
        key_axis=message.key_axis,
        caches=tuple(Cache(spec_of(each.input), each.present) for each in message.caches),
        inputs=tuple(spec_of(each) for each in message.inputs),
        outputs=tuple(spec_of(each) for each in message.outputs),
        batched=message.batched,
        paddable=message.paddable,
    )
