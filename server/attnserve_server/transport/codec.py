"""The meaning of wire messages: selections, priorities and arrays to domain values, and results to responses.

A value of a request that the contract does not define raises InvalidRequest; encoding fails as in `wire`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Final, TypeVar

from attnserve.v1 import attention_pb2, inference_service_pb2, tensor_pb2

from attnserve_server.domain.errors import Violations
from attnserve_server.domain.values import (
    AttentionAnswer,
    AttentionFeature,
    AttentionMap,
    AttentionSelection,
    AttentionUnit,
    AttentionValue,
    AxisUnits,
    EffectiveSelection,
    HeadReduction,
    LayerReduction,
    Links,
    Priority,
    RowFeatures,
    RunFacts,
    SequenceResult,
    SpecialTokens,
    WeightDtype,
)
from attnserve_server.transport.fields import delimiter, varint
from attnserve_server.transport.wire import Splice, as_sent, output_head, tensor_of

T = TypeVar("T")

CHUNK_BYTES: Final = 4 * 2**20 - 65_536
"""Larger answers are sent in chunks: with its envelope, a chunk stays below gRPC's default limit of 4 MiB."""
MAX_CHOSEN: Final = 4096
"""Most entries in one list of a selection: each is checked, so that their number bounds the cost of a request."""

_HEADS: Final[Mapping[int, HeadReduction | None]] = {
    attention_pb2.HEAD_REDUCTION_UNSPECIFIED: None,
    attention_pb2.HEAD_REDUCTION_EACH: HeadReduction.EACH,
    attention_pb2.HEAD_REDUCTION_MEAN: HeadReduction.MEAN,
    attention_pb2.HEAD_REDUCTION_MAX: HeadReduction.MAX,
}
_LAYERS: Final[Mapping[int, LayerReduction]] = {
    attention_pb2.LAYER_REDUCTION_UNSPECIFIED: LayerReduction.EACH,
    attention_pb2.LAYER_REDUCTION_EACH: LayerReduction.EACH,
    attention_pb2.LAYER_REDUCTION_MEAN: LayerReduction.MEAN,
    attention_pb2.LAYER_REDUCTION_ROLLOUT: LayerReduction.ROLLOUT,
}
_UNITS: Final[Mapping[int, AttentionUnit]] = {
    attention_pb2.ATTENTION_UNIT_UNSPECIFIED: AttentionUnit.TOKEN,
    attention_pb2.ATTENTION_UNIT_TOKEN: AttentionUnit.TOKEN,
    attention_pb2.ATTENTION_UNIT_WORD: AttentionUnit.WORD,
}
_SPECIAL: Final[Mapping[int, SpecialTokens]] = {
    attention_pb2.SPECIAL_TOKENS_UNSPECIFIED: SpecialTokens.KEEP,
    attention_pb2.SPECIAL_TOKENS_KEEP: SpecialTokens.KEEP,
    attention_pb2.SPECIAL_TOKENS_DROP: SpecialTokens.DROP,
}
_WEIGHTS: Final[Mapping[int, WeightDtype]] = {
    tensor_pb2.DATA_TYPE_UNSPECIFIED: WeightDtype.FLOAT32,
    tensor_pb2.DATA_TYPE_FLOAT32: WeightDtype.FLOAT32,
    tensor_pb2.DATA_TYPE_FLOAT16: WeightDtype.FLOAT16,
    tensor_pb2.DATA_TYPE_UINT8: WeightDtype.UINT8,
}
_VALUES: Final[Mapping[int, AttentionValue]] = {
    attention_pb2.ATTENTION_VALUE_UNSPECIFIED: AttentionValue.WEIGHTS,
    attention_pb2.ATTENTION_VALUE_WEIGHTS: AttentionValue.WEIGHTS,
    attention_pb2.ATTENTION_VALUE_SCORES: AttentionValue.SCORES,
}
_FEATURES: Final[Mapping[int, AttentionFeature]] = {
    attention_pb2.ATTENTION_FEATURE_ENTROPY: AttentionFeature.ENTROPY,
    attention_pb2.ATTENTION_FEATURE_TOP1_SHARE: AttentionFeature.TOP1_SHARE,
    attention_pb2.ATTENTION_FEATURE_FIRST_TOKEN: AttentionFeature.FIRST_TOKEN,
    attention_pb2.ATTENTION_FEATURE_MEAN_DISTANCE: AttentionFeature.MEAN_DISTANCE,
}
PRIORITIES: Final[Mapping[int, Priority]] = {
    inference_service_pb2.PRIORITY_UNSPECIFIED: Priority.NORMAL,
    inference_service_pb2.PRIORITY_LOW: Priority.LOW,
    inference_service_pb2.PRIORITY_NORMAL: Priority.NORMAL,
    inference_service_pb2.PRIORITY_HIGH: Priority.HIGH,
}
KINDS: Final = {
    "self": attention_pb2.ATTENTION_KIND_SELF,
    "causal": attention_pb2.ATTENTION_KIND_CAUSAL,
    "cross": attention_pb2.ATTENTION_KIND_CROSS,
}
FORMS: Final = {
    "dense": attention_pb2.ATTENTION_FORM_DENSE,
    "windowed": attention_pb2.ATTENTION_FORM_WINDOWED,
    "linear": attention_pb2.ATTENTION_FORM_LINEAR,
}
_HEADS_OUT: Final = {value: number for number, value in _HEADS.items() if value is not None}
_LAYERS_OUT: Final = {value: number for number, value in _LAYERS.items() if number}
_UNITS_OUT: Final = {value: number for number, value in _UNITS.items() if number}
_SPECIAL_OUT: Final = {value: number for number, value in _SPECIAL.items() if number}
_VALUES_OUT: Final = {value: number for number, value in _VALUES.items() if number}
_FEATURES_OUT: Final = {value: number for number, value in _FEATURES.items()}
_WEIGHTS_OUT: Final = {value: number for number, value in _WEIGHTS.items() if number}
_RESPONSE: Final = inference_service_pb2.InferResponse
_QUEUED: Final = struct.Struct("<Bd")
"""`queue_seconds` of a Run: its tag and a double."""
_QUEUED_TAG: Final = inference_service_pb2.Run.QUEUE_SECONDS_FIELD_NUMBER << 3 | 1
_PREDICTED_TAG: Final = varint(_RESPONSE.PREDICTED_BYTES_FIELD_NUMBER << 3)
_RESULT: Final = inference_service_pb2.SequenceResult
_STREAMED: Final = inference_service_pb2.StreamInferResponse.RESPONSE_FIELD_NUMBER
_MAP: Final = attention_pb2.AttentionMap
_LINKS: Final = attention_pb2.Links


def selection_of(message: attention_pb2.AttentionSelection) -> AttentionSelection:
    """Decode a selection as the caller sent it.

    Raises:
        InvalidRequest: An enum holds a number that the contract does not define, or a list is longer than `MAX_CHOSEN`.
    """
    violations = Violations()
    for name in ("sites", "layers", "heads", "queries", "features"):
        count = len(getattr(message, name))
        if count > MAX_CHOSEN:
            violations.add(f"attention.{name}", f"{count} entries exceed {MAX_CHOSEN}")
    heads = _named(_HEADS, message.head_reduction, "attention.head_reduction", violations)
    layers = _named(_LAYERS, message.layer_reduction, "attention.layer_reduction", violations)
    unit = _named(_UNITS, message.unit, "attention.unit", violations)
    special = _named(_SPECIAL, message.special_tokens, "attention.special_tokens", violations)
    dtype = _named(_WEIGHTS, message.dtype, "attention.dtype", violations)
    values = _named(_VALUES, message.values, "attention.values", violations)
    features = tuple(
        _named(_FEATURES, number, f"attention.features[{position}]", violations)
        for position, number in enumerate(message.features[:MAX_CHOSEN])
    )
    violations.raise_any()
    return AttentionSelection(
        sites=tuple(message.sites),
        layers=tuple(message.layers),
        heads=tuple(message.heads),
        head_reduction=heads,
        layer_reduction=layers,
        queries=tuple(message.queries),
        unit=unit,
        special_tokens=special,
        top_k=message.top_k,
        min_weight=message.min_weight,
        dtype=dtype,
        features=features,
        values=values,
    )


def priority_of(number: int) -> Priority:
    """Decode a priority. Raises InvalidRequest for a number that the contract does not define."""
    violations = Violations()
    priority = _named(PRIORITIES, number, "priority", violations)
    violations.raise_any()
    return priority


def _named(table: Mapping[int, T], number: int, field: str, violations: Violations) -> T:
    if number not in table:
        allowed = ", ".join(str(known) for known in sorted(table))
        violations.add(field, f"{number} is not one of {allowed}")
        return next(iter(table.values()))
    return table[number]


@lru_cache(maxsize=256)
def effective_bytes(effective: EffectiveSelection, sites: tuple[str, ...]) -> bytes:
    """Serialize the selection that was carried out (an AttentionSelection); sent as a request, it means the same.

    `sites`: the names of its layers' sites.
    """
    return attention_pb2.AttentionSelection(
        sites=sites,
        layers=effective.layers,
        heads=() if effective.all_heads else effective.heads[0],
        head_reduction=_HEADS_OUT[effective.head_reduction],  # type: ignore[arg-type]
        layer_reduction=_LAYERS_OUT[effective.layer_reduction],  # type: ignore[arg-type]
        queries=effective.queries,
        unit=_UNITS_OUT[effective.unit],  # type: ignore[arg-type]
        special_tokens=_SPECIAL_OUT[effective.special_tokens],  # type: ignore[arg-type]
        top_k=effective.top_k,
        min_weight=effective.min_weight,
        dtype=_WEIGHTS_OUT[effective.dtype],  # type: ignore[arg-type]
        features=[_FEATURES_OUT[feature] for feature in effective.features],  # type: ignore[misc]
        values=_VALUES_OUT[effective.values],  # type: ignore[arg-type]
    ).SerializeToString()


def result_of(result: SequenceResult, outputs: Sequence[str], labels: bytes | None = None) -> Splice:
    """Encode the result of one sequence (a SequenceResult) with its outputs in the order of `outputs`.

    `labels`: its serialized labels; None: none were selected.
    """
    message = Splice()
    for name in outputs:
        array = result.outputs[name]
        message.append(output_head(name, array.dtype, array.shape)).append(as_sent(array))
    if result.attention is not None:
        message.add(_RESULT.ATTENTION_FIELD_NUMBER, attention_of(result.attention))
    if labels is not None:
        message.add(_RESULT.LABELS_FIELD_NUMBER, labels)
    return message.append(_run_of(result.run) + _QUEUED.pack(_QUEUED_TAG, result.queue_s))


@lru_cache(maxsize=64)
def _run_of(run: RunFacts) -> bytes:
    """Serialize what all sequences of a run have in common (the field `run`, without `queue_seconds`, which follow)."""
    common = inference_service_pb2.Run(
        batch_size=run.batch_size,
        useful_tokens=run.useful_tokens,
        computed_tokens=run.computed_tokens,
        compute_seconds=run.compute_s,
        instance=run.instance,
    ).SerializeToString()
    return delimiter(_RESULT.RUN_FIELD_NUMBER, len(common) + _QUEUED.size) + common


def attention_of(answer: AttentionAnswer) -> Splice:
    """Encode all maps of one sequence (an Attention)."""
    message = Splice(attention_pb2.Attention(axes=map(_units_message, answer.axes)).SerializeToString())
    for found in answer.maps:
        message.add(attention_pb2.Attention.MAPS_FIELD_NUMBER, _map_of(found))
    return message


def _units_message(units: AxisUnits) -> attention_pb2.AxisUnits:
    return attention_pb2.AxisUnits(
        axis=units.axis,
        length=units.length,
        texts=units.texts,
        starts=units.starts,
        ends=units.ends,
        special=units.special,
        segments=units.segments,
        grid_rows=units.grid[0] if units.grid else 0,
        grid_columns=units.grid[1] if units.grid else 0,
        leading=units.leading,
    )


def _map_of(found: AttentionMap) -> Splice:
    head = attention_pb2.AttentionMap(
        sites=found.sites,
        layer=found.layer,
        kind=KINDS[found.kind],
        form=FORMS[found.form],
        heads=found.heads,
        query_axis=found.query_axis,
        key_axis=found.key_axis,
        query_indices=found.query_indices,
        key_indices=found.key_indices,
    )
    message = Splice(head.SerializeToString())
    content = found.content
    if isinstance(content, Links):
        links = Splice()
        links.add(_LINKS.ROW_OFFSETS_FIELD_NUMBER, tensor_of(content.row_offsets))
        links.add(_LINKS.KEYS_FIELD_NUMBER, tensor_of(content.keys))
        links.add(_LINKS.WEIGHTS_FIELD_NUMBER, tensor_of(content.weights))
        links.add(_LINKS.RESIDUAL_FIELD_NUMBER, tensor_of(content.residual))
        message.add(_MAP.LINKS_FIELD_NUMBER, links)
    elif isinstance(content, RowFeatures):
        message.add(_MAP.FEATURES_FIELD_NUMBER, tensor_of(content.values))
    else:
        message.add(_MAP.WEIGHTS_FIELD_NUMBER, tensor_of(content))
    if found.band_keys is not None:
        message.add(_MAP.BAND_KEYS_FIELD_NUMBER, tensor_of(found.band_keys))
    return message


@lru_cache(maxsize=256)
def receipt_of(model: str, version: str, digest: str, execution_provider: str, precision: str) -> bytes:
    """Serialize the part of a Receipt that is the same for every answer of a model."""
    return inference_service_pb2.Receipt(
        model=model, version=version, digest=digest, execution_provider=execution_provider, precision=precision
    ).SerializeToString()


def response_of(
    results: Sequence[Splice],
    request_id: str,
    receipt: bytes,
    effective: bytes,
    predicted_bytes: int,
    timings: bytes = b"",
) -> Splice:
    """Encode a whole answer (an InferResponse).

    Args:
        results: from `result_of`.
        request_id: of the request.
        receipt: from `receipt_of`.
        effective: the serialized selection that was carried out; empty: none was.
        predicted_bytes: tensor data, as predicted.
        timings: from `Timings.field`; empty: the request did not run.
    """
    message = Splice()
    for result in results:
        message.add(_RESPONSE.RESULTS_FIELD_NUMBER, result)
    if effective:
        message.add(_RESPONSE.EFFECTIVE_ATTENTION_FIELD_NUMBER, effective)
    if predicted_bytes:
        message.append(_PREDICTED_TAG + varint(predicted_bytes))
    named = request_id.encode()
    receipt += delimiter(inference_service_pb2.Receipt.REQUEST_ID_FIELD_NUMBER, len(named)) + named + timings
    return message.append(delimiter(_RESPONSE.RECEIPT_FIELD_NUMBER, len(receipt)) + receipt)


def streamed(request_id: str, answer: Splice | bytes) -> tuple[Iterator[bytes], int]:
    """Encode an answer on a stream: the messages (StreamInferResponse), made one by one, and their number.

    Args:
        request_id: of the request.
        answer: its InferResponse, sent in chunks if it is large; or a serialized google.rpc.Status.
    """
    envelope = inference_service_pb2.StreamInferResponse(request_id=request_id)
    if isinstance(answer, bytes):
        envelope.status = answer
        return iter((envelope.SerializeToString(),)), 1
    if answer.size <= CHUNK_BYTES:
        return iter((Splice(envelope.SerializeToString()).add(_STREAMED, answer).joined(),)), 1
    return _chunks(envelope, answer.joined()), math.ceil(answer.size / CHUNK_BYTES)


def _chunks(envelope: inference_service_pb2.StreamInferResponse, whole: bytes) -> Iterator[bytes]:
    starts = range(0, len(whole), CHUNK_BYTES)
    for index, start in enumerate(starts):
        piece = whole[start : start + CHUNK_BYTES]
        envelope.chunk.CopyFrom(inference_service_pb2.ResponseChunk(index=index, count=len(starts), data=piece))
        yield envelope.SerializeToString()
