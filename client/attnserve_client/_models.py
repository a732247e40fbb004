"""What a model is, as the server describes it: inputs, outputs, axes, sites and limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from attnserve.v1 import attention_pb2, model_pb2

from attnserve_client._patches import PatchGrid
from attnserve_client._tensors import dtype_name

KINDS: Final[dict[int, str]] = {
    attention_pb2.ATTENTION_KIND_SELF: "self",
    attention_pb2.ATTENTION_KIND_CAUSAL: "causal",
    attention_pb2.ATTENTION_KIND_CROSS: "cross",
}
FORMS: Final[dict[int, str]] = {
    attention_pb2.ATTENTION_FORM_DENSE: "dense",
    attention_pb2.ATTENTION_FORM_WINDOWED: "windowed",
    attention_pb2.ATTENTION_FORM_LINEAR: "linear",
}
_STATES: Final[dict[int, str]] = {
    model_pb2.MODEL_STATE_LOADING: "loading",
    model_pb2.MODEL_STATE_READY: "ready",
    model_pb2.MODEL_STATE_DRAINING: "draining",
    model_pb2.MODEL_STATE_FAILED: "failed",
}
_STATUSES: Final[dict[int, str]] = {
    model_pb2.BATCHING_STATUS_UNSPECIFIED: "",
    model_pb2.BATCHING_STATUS_PROVED: "proved",
    model_pb2.BATCHING_STATUS_TESTED: "tested",
    model_pb2.BATCHING_STATUS_REFUTED: "refuted",
    model_pb2.BATCHING_STATUS_UNKNOWN: "unknown",
}
_POLICIES: Final[dict[int, str]] = {
    model_pb2.BATCHING_POLICY_UNSPECIFIED: "",
    model_pb2.BATCHING_POLICY_PROVED: "proved",
    model_pb2.BATCHING_POLICY_TESTED: "tested",
    model_pb2.BATCHING_POLICY_OFF: "off",
}


@dataclass(frozen=True, slots=True)
class IndexRange:
    """Numbers that an input may hold which the model looks a table up with: from `least` to `greatest`, both legal.

    `column`: the place along the input's last axis that this is of; None: every element. `along`: the symbol of an axis
    whose positions are looked up; `least` then counts from minus its length and `greatest` from its length.
    """

    least: int
    greatest: int
    column: int | None = None
    along: str = ""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output. `shape` has an axis symbol or a fixed length for each axis, without the batch axis.

    `vocabulary_size`: of an input of token ids, which run from 0 to this less 1; 0 where that is not known.
    `index_ranges`: of any other input that tables are looked up with, the numbers that it may hold; empty: any.
    `additive_mask`: it is added to attention scores, and may hold -inf where a key is hidden.
    """

    name: str
    dtype: str
    shape: tuple[str | int, ...]
    optional: bool = False
    vocabulary_size: int = 0
    index_ranges: tuple[IndexRange, ...] = ()
    additive_mask: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """A dynamic axis: its symbol, its greatest length, and whether sequences of other lengths may share its batch.

    `grid`: how it covers an image; None where it holds no patches. `padding_status`: what is known of padding along it,
    `proved`, `tested`, `refuted` or `unknown`; empty for a fixed axis, and where the server does not tell.
    `padding_reason`: why it is not proved; empty where it is.
    """

    symbol: str
    max_length: int
    paddable: bool
    grid: PatchGrid | None = None
    padding_status: str = ""
    padding_reason: str = ""


@dataclass(frozen=True, slots=True)
class Site:
    """One place in the graph where attention is computed. `unavailable_reason` is empty where it answers."""

    name: str
    layer: int
    kind: str
    form: str
    heads: int
    kv_heads: int
    head_dim: int
    query_axis: str
    key_axis: str
    unavailable_reason: str = ""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One version of a model.

    Attributes:
        name: Its name.
        version: Its version, a positive integer in decimal.
        digest: `sha256:` and the hexadecimal digest of its bundle.
        state: `loading`, `ready`, `draining`, `failed`, or `unknown`.
        state_reason: Why it is failed or, where ready, why each sequence runs alone; empty otherwise.
        inputs: What it takes.
        outputs: What it gives.
        axes: Its dynamic axes, without the batch axis.
        sites: Where it attends.
        accepts_text: Whether it takes text.
        vocabulary_size: Token ids run from 0 to this less 1; 0 where it takes none.
        max_batch_size: Most sequences in one request.
        max_text_bytes: Most bytes of UTF-8 in one text.
        max_response_bytes: Most bytes of tensor data in one answer.
        precision: `fp32`, `fp16` or `int8`.
        execution_provider: What runs it; empty until loaded.
        text_axis: Axis symbol of a text's tokens; empty where it takes no text.
        text_pair_axis: That of a second text's: another where the second text has an input of its own.
        batching: The server's policy, `proved`, `tested` or `off`: what it asks for before sequences share a run.
            Empty where the server does not tell.
        batch_status: What is known of batch neighbours, `proved`, `tested`, `refuted` or `unknown`; empty likewise.
        batch_reason: Why it is not proved, in plain words; empty where it is.
        batched: Whether sequences share runs. If not, each runs alone, also those of one request.
    """

    name: str
    version: str
    digest: str
    state: str
    state_reason: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: tuple[Axis, ...]
    sites: tuple[Site, ...]
    accepts_text: bool
    vocabulary_size: int
    max_batch_size: int
    max_text_bytes: int
    max_response_bytes: int
    precision: str
    execution_provider: str
    text_axis: str = ""
    text_pair_axis: str = ""
    batching: str = ""
    batch_status: str = ""
    batch_reason: str = ""
    batched: bool = False

    @property
    def ready(self) -> bool:
        """Whether it answers."""
        return self.state == "ready"

    @property
    def token_input(self) -> str | None:
        """The input that bare token ids are for; None where that is not plain.

        It is `input_ids` where there is one, else the only input of rank 1 and integer type that a caller must give.
        """
        names = [spec.name for spec in self.inputs]
        if "input_ids" in names:
            return "input_ids"
        fits = [spec for spec in self.inputs if not spec.optional and len(spec.shape) == 1 and "int" in spec.dtype]
        return fits[0].name if len(fits) == 1 else None

    def input_dtype(self, name: str) -> str | None:
        """The element type of one input; None where there is no such input."""
        return next((spec.dtype for spec in self.inputs if spec.name == name), None)


def model_of(message: model_pb2.Model) -> ModelInfo:
    """The description that a message holds."""
    return ModelInfo(
        name=message.name,
        version=message.version,
        digest=message.digest,
        state=_STATES.get(message.state, "unknown"),
        state_reason=message.state_reason,
        inputs=tuple(_spec(each) for each in message.inputs),
        outputs=tuple(_spec(each) for each in message.outputs),
        axes=tuple(_axis(each) for each in message.axes),
        sites=tuple(_site(each) for each in message.sites),
        accepts_text=message.accepts_text,
        vocabulary_size=message.vocabulary_size,
        max_batch_size=message.max_batch_size,
        max_text_bytes=message.max_text_bytes,
        max_response_bytes=message.max_response_bytes,
        precision=message.precision,
        execution_provider=message.execution_provider,
        text_axis=message.text_axis,
        text_pair_axis=message.text_pair_axis,
        batching=_POLICIES.get(message.batching_policy, ""),
        batch_status=_STATUSES.get(message.batch_status, ""),
        batch_reason=message.batch_reason,
        batched=message.batched,
    )


def is_ready(models: list[ModelInfo]) -> bool:
    """Whether there is a model and the highest version of each is ready."""
    highest: dict[str, ModelInfo] = {}
    for model in models:
        best = highest.get(model.name)
        if best is None or _rank(model) > _rank(best):
            highest[model.name] = model
    return bool(highest) and all(model.ready for model in highest.values())


def _rank(model: ModelInfo) -> int:
    return int(model.version) if model.version.isdecimal() else -1


def _spec(message: model_pb2.TensorSpec) -> TensorSpec:
    shape = tuple(each.symbol if each.WhichOneof("extent") == "symbol" else each.size for each in message.shape)
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
    )


def _axis(message: model_pb2.Axis) -> Axis:
    grid = PatchGrid(message.grid_rows, message.grid_columns, message.leading) if message.grid_rows else None
    status = _STATUSES.get(message.padding_status, "")
    return Axis(message.symbol, message.max_length, message.paddable, grid, status, message.padding_reason)


def _site(message: model_pb2.Site) -> Site:
    facts: dict[str, Any] = {
        name: getattr(message, name)
        for name in ("name", "layer", "heads", "kv_heads", "head_dim", "query_axis", "key_axis", "unavailable_reason")
    }
    return Site(kind=KINDS.get(message.kind, "unknown"), form=FORMS.get(message.form, "unknown"), **facts)
