"""The server's description of a model: inputs, outputs, axes, sites and limits.

Decoding it does not fail: a state, kind or form that this client does not know becomes `unknown`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from attnserve.v1 import attention_pb2, model_pb2, model_service_pb2

from attnserve_client._labels import Head, head_of
from attnserve_client._patches import PatchGrid
from attnserve_client._specs import Past, TensorSpec, past_of, spec_of

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
STATES: Final[dict[int, str]] = {
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
class Axis:
    """A dynamic axis.

    Attributes:
        symbol: Its symbol.
        max_length: Greatest length.
        paddable: Whether sequences of different lengths along it share a batch.
        grid: The image grid of its patches; None for an axis without patches.
        padding_status: Whether padding along it can change an answer: `proved` that it cannot, `tested`, `refuted` or
            `unknown`; empty for a fixed axis, and if the server does not report it.
        padding_reason: Why the status is not `proved`; empty if it is.
        formula: The sum or product of other axes that its length equals in every sequence, such as `past + seq`; empty:
            none.
    """

    symbol: str
    max_length: int
    paddable: bool
    grid: PatchGrid | None = None
    padding_status: str = ""
    padding_reason: str = ""
    formula: str = ""


@dataclass(frozen=True, slots=True)
class Site:
    """One place in the graph where attention is computed.

    Attributes:
        name: Its name.
        layer: Its position in the model's list, from 0.
        kind: `self`, `causal` or `cross`.
        form: `dense`, `windowed` or `linear`.
        heads: Number of query heads.
        kv_heads: Number of key and value heads.
        head_dim: Dimension of a head.
        query_axis: Axis symbol of the queries.
        key_axis: Axis symbol of the keys.
        unavailable_reason: Why its attention cannot be returned; empty if it can.
        scores_unavailable_reason: Why its scores cannot be returned; empty if they can.
    """

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
    scores_unavailable_reason: str = ""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One version of a model.

    Attributes:
        name: Its name.
        version: Its version, a positive integer in decimal.
        digest: `sha256:` and the hexadecimal digest of its bundle.
        state: `loading`, `ready`, `draining`, `failed`, or `unknown`.
        state_reason: Why it failed or, if it is ready, why each sequence runs alone; empty otherwise.
        inputs: Its inputs.
        outputs: Its outputs.
        axes: Its dynamic axes, without the batch axis.
        sites: Its attention sites.
        accepts_text: Whether it has a tokenizer, so that inputs may be text.
        vocabulary_size: Number of token ids, which must be below it; 0 if it takes none.
        max_batch_size: Most sequences in one request.
        max_text_bytes: Most bytes of UTF-8 in one text.
        max_response_bytes: Most bytes of tensor data in one response.
        precision: Precision that serves: `fp32`, `fp16`, `int8`, or `bf16-scores` (bfloat16 throughout).
        execution_provider: Execution provider that runs it; empty until it is loaded.
        text_axis: Axis symbol of a text's tokens; empty if it takes no text.
        text_pair_axis: Axis symbol of a second text's tokens; it differs if the second text has a separate input.
        batching: The server's batching policy, `proved`, `tested` or `off`: the status that sequences must have to
            share a run. Empty if the server does not report it.
        batch_status: Whether batch neighbours can change an answer: `proved` that they cannot, `tested`, `refuted` or
            `unknown`; empty if the server does not report it.
        batch_reason: Why the status is not `proved`; empty if it is.
        batched: Whether sequences share runs. If not, each runs alone, even those of one request.
        head: Its head, from whose outputs the server computes labels; None without one.
        prompts: Texts that a request can put before its texts, by name.
        default_prompt_name: Name of the prompt of a request that names none; empty for no prompt.
        similarity: Function that compares its embeddings, for example `cosine`; empty if unknown.
        past: The past that its sequences may have; None if they have none.
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
    head: Head | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str = ""
    similarity: str = ""
    past: Past | None = None

    @property
    def ready(self) -> bool:
        """Whether the model answers requests."""
        return self.state == "ready"

    @property
    def token_input(self) -> str | None:
        """Name of the input that receives bare token ids; None if there is no such input, or several.

        `input_ids` if the model has it, else the only required input of rank 1 and integer type.
        """
        names = [spec.name for spec in self.inputs]
        if "input_ids" in names:
            return "input_ids"
        fits = [spec for spec in self.inputs if not spec.optional and len(spec.shape) == 1 and "int" in spec.dtype]
        return fits[0].name if len(fits) == 1 else None

    def input_dtype(self, name: str) -> str | None:
        """Return the element type of an input; None for an unknown input."""
        return next((spec.dtype for spec in self.inputs if spec.name == name), None)


def model_of(message: model_pb2.Model) -> ModelInfo:
    """Return the description in a message."""
    return ModelInfo(
        name=message.name,
        version=message.version,
        digest=message.digest,
        state=STATES.get(message.state, "unknown"),
        state_reason=message.state_reason,
        inputs=tuple(spec_of(each) for each in message.inputs),
        outputs=tuple(spec_of(each) for each in message.outputs),
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
        head=head_of(message.head) if message.HasField("head") else None,
        prompts={each.name: each.text for each in message.prompts},
        default_prompt_name=message.default_prompt_name,
        similarity=message.similarity,
        past=past_of(message.past) if message.HasField("past") else None,
    )


@dataclass(frozen=True, slots=True)
class ModelChange:
    """What became of one version by a reload.

    Attributes:
        name: The model's name.
        version: Its version.
        outcome: `loaded`, `replaced`, `unloaded`, `failed`, or `unknown`.
        reason: Why it could not be loaded; empty for other outcomes.
    """

    name: str
    version: str
    outcome: str
    reason: str = ""


_OUTCOMES: Final = {
    model_service_pb2.MODEL_OUTCOME_LOADED: "loaded",
    model_service_pb2.MODEL_OUTCOME_REPLACED: "replaced",
    model_service_pb2.MODEL_OUTCOME_UNLOADED: "unloaded",
    model_service_pb2.MODEL_OUTCOME_FAILED: "failed",
}


def change_of(message: model_service_pb2.ModelChange) -> ModelChange:
    """Return a change as the client returns it."""
    outcome = _OUTCOMES.get(message.outcome, "unknown")
    return ModelChange(message.model, message.version, outcome, message.reason)


def why_not_ready(models: list[ModelInfo]) -> str:
    """Return an empty text if there is a model, and each model has a version that is ready; otherwise what lacks."""
    waiting = {model.name: model for model in models}
    for model in models:
        if model.ready:
            waiting.pop(model.name, None)
    found = (f"model {each.name!r} is {each.state}" for each in waiting.values())
    reasons = ", ".join(found) or ("" if models else "the server has no models")
    why = next((each.state_reason for each in waiting.values() if each.state_reason), "")
    return f"{reasons}: {why}" if why else reasons


def _axis(message: model_pb2.Axis) -> Axis:
    grid = PatchGrid(message.grid_rows, message.grid_columns, message.leading) if message.grid_rows else None
    status = _STATUSES.get(message.padding_status, "")
    return Axis(
        message.symbol, message.max_length, message.paddable, grid, status, message.padding_reason, message.formula
    )


def _site(message: model_pb2.Site) -> Site:
    facts: dict[str, Any] = {
        name: getattr(message, name)
        for name in (
            "name",
            "layer",
            "heads",
            "kv_heads",
            "head_dim",
            "query_axis",
            "key_axis",
            "unavailable_reason",
            "scores_unavailable_reason",
        )
    }
    return Site(kind=KINDS.get(message.kind, "unknown"), form=FORMS.get(message.form, "unknown"), **facts)
