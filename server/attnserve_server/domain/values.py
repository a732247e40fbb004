"""The frozen values that packages exchange: what attention is selected, a sequence ready to run, and its result.

No class checks its fields: the code that makes a value does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Priority(IntEnum):
    """How urgent a request is; the greater the value, the more."""

    LOW = 0
    NORMAL = 1
    HIGH = 2


class HeadReduction(StrEnum):
    """How the selected heads of a site are joined."""

    EACH = "each"
    MEAN = "mean"
    MAX = "max"


class LayerReduction(StrEnum):
    """How the selected sites are joined."""

    EACH = "each"
    MEAN = "mean"
    ROLLOUT = "rollout"


class AttentionUnit(StrEnum):
    """What one row and one column of a map represents."""

    TOKEN = "token"  # noqa: S105 - a word of text, no secret
    WORD = "word"


class SpecialTokens(StrEnum):
    """Whether special tokens stay in the maps."""

    KEEP = "keep"
    DROP = "drop"


class AttentionValue(StrEnum):
    """What a map holds: weights, or the scores that softmax makes them of."""

    WEIGHTS = "weights"
    SCORES = "scores"


class AttentionFeature(StrEnum):
    """A number computed from one row of weights; `attention.features` has the formulas."""

    ENTROPY = "entropy"
    TOP1_SHARE = "top1_share"
    FIRST_TOKEN = "first_token"  # noqa: S105 - a position, no secret
    MEAN_DISTANCE = "mean_distance"


class WeightDtype(StrEnum):
    """Element type of the weights in the answer."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    UINT8 = "uint8"

    @property
    def item_bytes(self) -> int:
        """Bytes of one weight."""
        return {WeightDtype.FLOAT32: 4, WeightDtype.FLOAT16: 2, WeightDtype.UINT8: 1}[self]


@dataclass(frozen=True, slots=True)
class AttentionSelection:
    """A selection as the caller sent it; empty tuples and None mean the defaults that the contract states."""

    sites: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    head_reduction: HeadReduction | None = None
    layer_reduction: LayerReduction = LayerReduction.EACH
    queries: tuple[int, ...] = ()
    unit: AttentionUnit = AttentionUnit.TOKEN
    special_tokens: SpecialTokens = SpecialTokens.KEEP
    top_k: int = 0
    min_weight: float = 0.0
    dtype: WeightDtype = WeightDtype.FLOAT32
    features: tuple[AttentionFeature, ...] = ()
    values: AttentionValue = AttentionValue.WEIGHTS


@dataclass(frozen=True, slots=True)
class EffectiveSelection:
    """A selection checked against a model: sites and heads by non-negative index, no defaults left open.

    `layers` are positions in the model's list of sites, ascending, each once. `heads` holds the selected heads of each
    of those sites. `queries` stays as the caller sent it, because sequences differ in length.
    """

    layers: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    head_reduction: HeadReduction
    layer_reduction: LayerReduction
    queries: tuple[int, ...]
    unit: AttentionUnit
    special_tokens: SpecialTokens
    top_k: int
    min_weight: float
    dtype: WeightDtype
    all_heads: bool = True
    """Whether the caller left `heads` empty, so that the echoed selection leaves it empty too."""
    features: tuple[AttentionFeature, ...] = ()
    """The features of each row that the answer holds in place of maps; empty: maps."""
    values: AttentionValue = AttentionValue.WEIGHTS

    @property
    def scores(self) -> bool:
        """Whether the maps hold scores."""
        return self.values is AttentionValue.SCORES

    @property
    def sparse(self) -> bool:
        """Whether the answer holds links instead of whole maps."""
        return self.top_k > 0 or self.min_weight > 0

    def joins_heads(self, layer: int, count: int) -> bool:
        """Whether the weights of a selected site, of `count` heads, are read only as their mean over all heads."""
        chosen = self.heads[self.layers.index(layer)]
        return self.head_reduction is HeadReduction.MEAN and not self.scores and len(chosen) == count


@dataclass(frozen=True, slots=True)
class LabelSelection:
    """A selection of labels, resolved against the head of a model.

    `min_score`: None keeps all labels. `words`: whether units and answers are words; False: tokens. `texts`: the
    caller's text and its pair, from which answers are cut; empty if the sequence is not text.
    """

    top_k: int
    min_score: float | None = None
    words: bool = False
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Label:
    """One label: its index in the head's labels, or a token id, and its score after the activation."""

    index: int
    score: float


@dataclass(frozen=True, slots=True)
class LabeledSpan:
    """A token, word, masked position or answer: its text and span, its first and last position, labels and score."""

    text: str
    start: int
    end: int
    segment: int
    first: int
    last: int
    labels: tuple[Label, ...]
    score: float


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of one sequence: of the whole sequence, or of parts of it."""

    labels: tuple[Label, ...] = ()
    spans: tuple[LabeledSpan, ...] = ()


@dataclass(frozen=True, slots=True)
class AxisUnits:
    """The positions along one axis of one sequence, N in number, before any merging.

    Each tuple has N entries, or none if its content is unknown. `word_ids` gives each position's word, counted from 0
    over the whole sequence, and -1 for special tokens; `words` the text of each word, and `word_spans` its position in
    the text as (segment, start, end). `grid`: the positions after the first `leading` ones are image patches, row by
    row, of so many rows and columns.
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


@dataclass(slots=True)
class PreparedSequence:
    """One sequence, validated and ready for a batch. Not changed once made.

    It is not frozen, because to make one of each sequence would then take three times as long.
    `tensors` holds every model input without the batch axis, C-contiguous, in the model's dtype. `lengths` gives the
    length of each axis symbol (without the batch axis, and without derived axes, whose positions are counted with those
    of their source). `outputs` names the outputs that are fetched: those of the answer, and those that its labels are
    computed from. `units` has an entry for each axis that a selected map or label has.
    """

    tensors: Mapping[str, Array]
    lengths: Mapping[str, int]
    outputs: tuple[str, ...]
    attention: EffectiveSelection | None = None
    labels: LabelSelection | None = None
    units: Mapping[str, AxisUnits] = field(default_factory=dict)
    response_bytes: int = 0
    """Bytes of tensor data that its answer will hold; with `min_weight` at most this."""
    keep_values: bool = False
    """Whether `SequenceResult.values` holds a copy of its values, for a comparison with the sequence alone."""
    is_whole_request: bool = False
    """Whether its request has no other sequence, so that its answer is encoded as soon as its run ends."""
    unpadded: bool = False
    """Whether it runs only with sequences of equal lengths: its masks break a need of the model's certificate, and
    padding could change its answer."""
    past: int = 0
    """Positions of its past, P; 0: it has none. The continuing graph runs it, and its values follow the manifest of
    that graph."""
    origin: tuple[int, int] = (0, 0)
    """The number of the front that sent its request, and the request's number there."""
    fault: str = ""
    """What `engine.failpoints` does in its run; empty: nothing."""

    tokens: int = field(init=False)
    """Positions that hold data, summed over the axes; one if there are no axes."""
    bytes: int = field(init=False)
    """Bytes of its tensors."""

    def __post_init__(self) -> None:
        self.tokens = sum(self.lengths.values()) or 1
        self.bytes = sum([tensor.nbytes for tensor in self.tensors.values()])

    @property
    def selects_scores(self) -> bool:
        """Whether it selects attention, and its values are scores."""
        return self.attention is not None and self.attention.scores


@dataclass(frozen=True, slots=True)
class Links:
    """The kept weights of a map, row after row (row = head * queries + query), greatest weight first."""

    row_offsets: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int32]
    weights: Array
    residual: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RowFeatures:
    """The features of each row of a map, float32 (heads, queries, features), in the order of the selection."""

    values: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """One map of the answer: `content` is (heads, queries, keys) in the selection's dtype, or links, or features.

    With `band_keys`, int32 (queries, W), `content` is (heads, queries, W): the key unit of each column, -1 for none.
    `layer` is -1 for joined sites. Empty indices mean all units of the axis, in order.
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
    content: Array | Links | RowFeatures
    band_keys: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True)
class AttentionAnswer:
    """All maps of one sequence, with the units of every axis that they have, merged into words if selected."""

    axes: tuple[AxisUnits, ...]
    maps: tuple[AttentionMap, ...]


@dataclass(frozen=True, slots=True)
class RunFacts:
    """How a sequence was run.

    `batch_size`: sequences of the run. `useful_tokens`: their positions that carry data. `computed_tokens`: all
    positions of the run, padding included. `compute_s`: seconds of the run. `instance`: index of its thread. `wide`:
    whether the run used all cores. `began_s`: its start, in monotonic seconds; only known in the process that ran it.
    """

    batch_size: int
    useful_tokens: int
    computed_tokens: int
    compute_s: float
    instance: int
    wide: bool = False
    began_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SequenceResult:
    """The answer for one sequence: outputs by name, cropped to its own lengths."""

    outputs: Mapping[str, Array]
    attention: AttentionAnswer | None
    run: RunFacts
    queue_s: float = 0.0
    """Seconds from its arrival to the start of its run."""
    labels: Labels | None = None
    attention_s: float = 0.0
    """Seconds that the reduction of its attention took."""
    attention_began_s: float = 0.0
    """When that began, as `RunFacts.began_s`."""
    values: Mapping[str, Array] | None = None
    """With `keep_values`: outputs and, as `attention.<site>`, weights, cropped and not reduced."""
