"""The frozen values that cross rooms: a sequence ready to run, and what comes back for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from attnserve_server.domain.selection import EffectiveSelection

Array = npt.NDArray[Any]


class Priority(IntEnum):
    """How urgent a request is; the value is its rank."""

    LOW = 0
    NORMAL = 1
    HIGH = 2


@dataclass(frozen=True, slots=True)
class AxisUnits:
    """The positions along one axis of one sequence, N in number, before any merging.

    The lists hold N entries each, or none where the thing is not known. `word_ids` gives each position's word, counted
    from 0 over the whole sequence, and -1 for special tokens; `words` the text of each word, with its place in
    `word_spans` as (segment, start, end). `grid`: rows and columns of the image patches that the positions behind the
    first `leading` ones are, row by row.
    """

    axis: str
    length: int
    texts: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    special: tuple[bool, ...] = ()
    segments: tuple[int, ...] = ()
    word_ids: tuple[int, ...] = ()
    words: tuple[str, ...] = ()
    word_spans: tuple[tuple[int, int, int], ...] = ()
    grid: tuple[int, int] | None = None
    leading: int = 0


@dataclass(frozen=True, slots=True)
class PreparedSequence:
    """One sequence, validated and ready for a batch.

    `tensors` holds every model input without the batch axis, C-contiguous, in the model's dtype. `lengths` gives the
    length of each axis symbol (without the batch axis, and without derived axes, whose positions are counted with those
    of their source). `units` has an entry for each axis that a wanted map names.
    """

    tensors: Mapping[str, Array]
    lengths: Mapping[str, int]
    outputs: tuple[str, ...]
    attention: EffectiveSelection | None = None
    units: Mapping[str, AxisUnits] = field(default_factory=dict)
    response_bytes: int = 0
    """Bytes of tensor data that its answer will hold; with `min_weight` at most that."""
    keep_values: bool = False
    """Whether `SequenceResult.values` shall hold a copy of its values, for a comparison with the sequence alone."""
    is_whole_request: bool = False
    """Whether it is all of its request: its answer is then encoded as soon as its run ends."""
    unpadded: bool = False
    """Whether padding could change its answer, because its masks break a need of the model's certificate. It then runs
    with sequences of its own lengths only."""

    @property
    def tokens(self) -> int:
        """Positions that carry data, summed over the axes: what batching counts. Without axes, one."""
        return sum(self.lengths.values()) or 1


@dataclass(frozen=True, slots=True)
class Links:
    """The kept weights of a map, row after row (row = head * queries + query), greatest weight first."""

    row_offsets: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int32]
    weights: Array
    residual: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """One map of the answer: `content` is (heads, queries, keys) in the selection's dtype, or links.

    With `band_keys`, int32 (queries, W), `content` is (heads, queries, W): the key unit of each column, -1 for none.
    """

    sites: tuple[str, ...]
    layer: int
    kind: str
    form: str
    heads: tuple[int, ...]
    query_axis: str
    key_axis: str
    query_indices: tuple[int, ...]
    key_indices: tuple[int, ...]
    content: Array | Links
    band_keys: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True)
class AttentionAnswer:
    """All maps of one sequence, with the units of every axis that they name (after merging into words, if asked)."""

    axes: tuple[AxisUnits, ...]
    maps: tuple[AttentionMap, ...]


@dataclass(frozen=True, slots=True)
class RunFacts:
    """How a sequence was run."""

    batch_size: int
    useful_tokens: int
    computed_tokens: int
    compute_s: float
    instance: int


@dataclass(frozen=True, slots=True)
class SequenceResult:
    """The answer for one sequence: outputs by name, cropped to its own lengths."""

    outputs: Mapping[str, Array]
    attention: AttentionAnswer | None
    run: RunFacts
    queue_s: float = 0.0
    """From its arrival to the start of its run."""
    values: Mapping[str, Array] | None = None
    """Where `keep_values` asks for them: outputs and, as `attention.<site>`, weights, cropped and not reduced."""
