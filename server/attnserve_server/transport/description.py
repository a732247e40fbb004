"""A manifest as the contract's Model message. The data plane adds the model's state and limits.

Manifests have passed their checks, so nothing here fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from attnserve.v1 import model_pb2

from attnserve_server.model.batching import Ruling, rulings
from attnserve_server.model.certificate import Batching
from attnserve_server.model.manifest import InputRole, InputSpec, Manifest, OutputSpec, PastSpec
from attnserve_server.transport import codec
from attnserve_server.transport.labels import head_message
from attnserve_server.transport.wire import WIRE_DTYPES

_POLICIES: Final[dict[Batching, model_pb2.BatchingPolicy.ValueType]] = {
    "proved": model_pb2.BATCHING_POLICY_PROVED,
    "tested": model_pb2.BATCHING_POLICY_TESTED,
    "off": model_pb2.BATCHING_POLICY_OFF,
}
_STATUSES: Final[dict[str, model_pb2.BatchingStatus.ValueType]] = {
    "": model_pb2.BATCHING_STATUS_UNSPECIFIED,
    "proved": model_pb2.BATCHING_STATUS_PROVED,
    "tested": model_pb2.BATCHING_STATUS_TESTED,
    "refuted": model_pb2.BATCHING_STATUS_REFUTED,
    "unknown": model_pb2.BATCHING_STATUS_UNKNOWN,
}
_NEVER_PADDED: Final = Ruling("", allowed=False, status="", reason="")
"""Stands in for a fixed axis, which has no ruling."""


def spec_messages(
    specs: Iterable[tuple[str, str, Sequence[str | int]]],
) -> list[model_pb2.TensorSpec]:
    """Encode inputs or outputs, given as (name, dtype, shape)."""
    return [
        model_pb2.TensorSpec(
            name=name,
            dtype=WIRE_DTYPES[dtype],
            shape=[
                model_pb2.Dimension(symbol=extent) if isinstance(extent, str) else model_pb2.Dimension(size=extent)
                for extent in shape
            ],
        )
        for name, dtype, shape in specs
    ]


def _inputs(specs: Sequence[InputSpec], manifest: Manifest) -> list[model_pb2.TensorSpec]:
    messages = spec_messages((spec.name, spec.dtype, spec.shape) for spec in specs)
    for described, spec in zip(messages, specs, strict=True):
        described.optional = spec.optional
        described.vocabulary_size = manifest.vocabulary_of(spec) if spec.role is InputRole.TOKEN_IDS else 0
        described.index_ranges.extend(
            model_pb2.IndexRange(least=each.least, greatest=each.greatest, column=each.column, along=each.along)
            for each in spec.index_ranges
        )
        described.additive_mask = spec.additive_mask
    return messages


def _outputs(specs: Sequence[OutputSpec]) -> list[model_pb2.TensorSpec]:
    messages = spec_messages((spec.name, spec.dtype, spec.shape) for spec in specs)
    for described, spec in zip(messages, specs, strict=True):
        described.on_request = spec.on_request
    return messages


def _past(past: PastSpec, manifest: Manifest) -> model_pb2.Past:
    caches = _inputs([cache.input for cache in past.caches], manifest)
    return model_pb2.Past(
        axis=past.axis,
        new_axis=past.follows,
        key_axis=past.key_axis,
        caches=[
            model_pb2.Cache(input=described, present=cache.present)
            for described, cache in zip(caches, past.caches, strict=True)
        ],
        inputs=_inputs(past.inputs, manifest),
        outputs=_outputs(past.outputs),
        batched=past.batched and manifest.max_batch_size > 1,
        paddable=past.paddable,
    )


def describe(message: model_pb2.Model, manifest: Manifest, batching: Batching) -> None:
    """Write into `message` what a manifest declares, and what a batching policy makes of it."""
    batch, *others = rulings(manifest, batching)
    along = {ruling.axis: ruling for ruling in others}
    message.batching_policy = _POLICIES[batching]
    message.batch_status = _STATUSES[batch.status]
    message.batch_reason = batch.reason
    message.batched = manifest.max_batch_size > 1
    message.digest = manifest.digest
    message.inputs.extend(_inputs(manifest.inputs, manifest))
    message.outputs.extend(_outputs(manifest.outputs))
    if manifest.past is not None:
        message.past.CopyFrom(_past(manifest.past, manifest))
    message.axes.extend(
        model_pb2.Axis(
            symbol=axis.symbol,
            max_length=axis.max_length,
            paddable=axis.paddable,
            grid_rows=axis.grid[0] if axis.grid else 0,
            grid_columns=axis.grid[1] if axis.grid else 0,
            leading=axis.leading,
            padding_status=_STATUSES[along.get(axis.symbol, _NEVER_PADDED).status],
            padding_reason=along.get(axis.symbol, _NEVER_PADDED).reason,
            formula=axis.formula,
        )
        for axis in manifest.axes
    )
    message.sites.extend(
        model_pb2.Site(
            name=site.name,
            layer=site.layer,
            kind=codec.KINDS[site.kind],
            form=codec.FORMS[site.form],
            heads=site.heads,
            kv_heads=site.kv_heads,
            head_dim=site.head_dim,
            query_axis=site.query_axis,
            key_axis=site.key_axis,
            unavailable_reason=site.unavailable_reason,
            scores_unavailable_reason=site.why_no_scores,
        )
        for site in manifest.sites
    )
    if manifest.head is not None:
        message.head.CopyFrom(head_message(manifest.head, "" if manifest.text is None else manifest.text.mask_token))
    message.vocabulary_size = manifest.vocabulary_size
    message.similarity = "" if manifest.embedding is None else manifest.embedding.similarity
    if manifest.text is not None:
        prompts = sorted(manifest.text.prompts.items())
        message.prompts.extend(model_pb2.Prompt(name=name, text=prompt) for name, prompt in prompts)
        message.default_prompt_name = manifest.text.default_prompt
        message.text_axis = manifest.text.axis
        message.text_pair_axis = manifest.text.pair_axis or manifest.text.axis
    message.precision = manifest.precision
