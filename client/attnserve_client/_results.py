"""The results of a call, and their decoding and checks."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from attnserve.v1 import attention_pb2
from attnserve.v1 import inference_service_pb2 as wire

from attnserve_client._attention import AttentionMap
from attnserve_client._features import AttentionFeatures, SiteFeatures
from attnserve_client._labels import Labels, labels_of
from attnserve_client._models import FORMS, KINDS
from attnserve_client._patches import PatchGrid
from attnserve_client._receipts import Receipt, Run, receipt_of, run_of
from attnserve_client._selection import AttentionSelection, AttentionValue
from attnserve_client._status import bad_answer
from attnserve_client._summary import Maps, summary_of
from attnserve_client._tensors import to_array
from attnserve_client._tokens import RawLinks, Token
from attnserve_client.errors import AttnserveError, BadAnswer


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class InferenceResult:
    """The result for one sequence.

    Attributes:
        outputs: The selected outputs by name, without the batch axis: read-only views of the response's bytes.
        attention: One map for each selected site, or one for all with joined layers; empty without attention, and with
            features.
        run: How the sequence was run.
        receipt: The model and server; the same for all sequences of one call.
        effective_attention: The selection that the server applied, defaults filled in; None without attention.
        predicted_bytes: Bytes of tensor data in the whole response, for all sequences of the call together; with
            labels, an upper bound that counts them too.
        labels: The labels of the model's head; None if none were selected.
        features: The features of each selected site; None unless the selection has features.
    """

    outputs: dict[str, npt.NDArray[Any]]
    attention: list[AttentionMap]
    run: Run
    receipt: Receipt
    effective_attention: AttentionSelection | None
    predicted_bytes: int
    labels: Labels | None = None
    features: AttentionFeatures | None = None

    def __repr__(self) -> str:
        """Return model, outputs with their shapes, maps and digest on one line."""
        return summary_of(self)

    def _repr_html_(self) -> str:
        """Return the summary and the first map, for notebooks."""
        first = self.attention[0]._repr_html_() if self.attention else None
        return f"<p><code>{html.escape(repr(self))}</code></p>{first or ''}"


@dataclass(frozen=True, slots=True, eq=False)
class StreamAnswer:
    """The answer to one input of a stream: a result or an error.

    Attributes:
        index: Index of the input on the stream, from 0.
        request_id: Id of its request on the stream.
        outcome: The result or the error; the properties `result` and `error` distinguish them.
    """

    index: int
    request_id: str
    outcome: InferenceResult | AttnserveError

    @property
    def error(self) -> AttnserveError | None:
        """The error; None if the input has a result."""
        return self.outcome if isinstance(self.outcome, AttnserveError) else None

    @property
    def result(self) -> InferenceResult:
        """The result.

        Raises:
            AttnserveError: The request of this input failed.
        """
        if isinstance(self.outcome, AttnserveError):
            raise self.outcome
        return self.outcome


def results_of(message: wire.InferResponse, sequences: int, *, validate_only: bool) -> list[InferenceResult]:
    """Decode and check a response.

    Args:
        message: The response.
        sequences: Number of sequences of the request.
        validate_only: Whether the request only predicted sizes, so that the response has no results.

    Returns:
        A result for each sequence; with `validate_only` without outputs and attention.

    Raises:
        BadAnswer: The response breaks the contract.
    """
    receipt = receipt_of(message.receipt)
    has_attention = message.HasField("effective_attention")
    effective = AttentionSelection.from_wire(message.effective_attention) if has_attention else None
    names = () if effective is None else tuple(effective.features)
    items = [wire.SequenceResult()] * sequences if validate_only else message.results
    if len(items) != sequences:
        raise bad_answer(f"it has {len(items)} results for {sequences} sequences", receipt.request_id)
    try:
        return [
            InferenceResult(
                outputs={tensor.name: to_array(tensor) for tensor in item.outputs},
                attention=Maps() if names else _maps_of(item.attention, receipt.model, _labels_of(item), effective),
                run=run_of(item.run),
                receipt=receipt,
                effective_attention=effective,
                predicted_bytes=message.predicted_bytes,
                labels=_labels_of(item),
                features=_features_of(item.attention, names, receipt.model) if names and not validate_only else None,
            )
            for item in items
        ]
    except BadAnswer as error:
        error.request_id = receipt.request_id
        raise


def _labels_of(message: wire.SequenceResult) -> Labels | None:
    return labels_of(message.labels) if message.HasField("labels") else None


def _maps_of(
    message: attention_pb2.Attention, model: str, labels: Labels | None, effective: AttentionSelection | None
) -> list[AttentionMap]:
    axes = {units.axis: _tokens_of(units) for units in message.axes}
    grids = {units.axis: _grid_of(units) for units in message.axes if units.grid_rows}
    values: AttentionValue = "weights" if effective is None else effective.values or "weights"
    return Maps(_map_of(each, axes, grids, model, labels, values) for each in message.maps)


def _grid_of(units: attention_pb2.AxisUnits) -> PatchGrid:
    grid = PatchGrid(units.grid_rows, units.grid_columns, units.leading)
    if grid.leading + grid.rows * grid.columns != units.length:
        patches = f"{grid.leading} and {grid.rows} x {grid.columns} patches"
        raise bad_answer(f"axis {units.axis!r} has {units.length} units and a grid of {patches}")
    return grid


def _tokens_of(units: attention_pb2.AxisUnits) -> tuple[Token, ...]:
    count = units.length
    for name in ("texts", "starts", "ends", "special", "segments"):
        if len(getattr(units, name)) not in (0, count):
            raise bad_answer(f"axis {units.axis!r} has {count} units and {len(getattr(units, name))} {name}")
    return tuple(
        Token(
            index=index,
            text=units.texts[index] if units.texts else str(index),
            start=units.starts[index] if units.starts else 0,
            end=units.ends[index] if units.ends else 0,
            special=units.special[index] if units.special else False,
            segment=units.segments[index] if units.segments else 0,
        )
        for index in range(count)
    )


def _map_of(
    message: attention_pb2.AttentionMap,
    axes: dict[str, tuple[Token, ...]],
    grids: dict[str, PatchGrid],
    model: str,
    labels: Labels | None,
    values: AttentionValue,
) -> AttentionMap:
    rows = _chosen(axes, message.query_axis, message.query_indices)
    columns = _chosen(axes, message.key_axis, message.key_indices)
    residual: npt.NDArray[np.float32] | None = None
    band_keys: npt.NDArray[np.int32] | None = None
    raw: npt.NDArray[Any] | RawLinks
    if message.WhichOneof("content") == "links":
        links = message.links
        raw = RawLinks(to_array(links.row_offsets), to_array(links.keys), to_array(links.weights))
        residual = to_array(links.residual)
        _check_links(raw, residual, len(rows), {token.index for token in columns})
    else:
        raw = to_array(message.weights)
        if message.HasField("band_keys"):
            band_keys = to_array(message.band_keys)
            _check_band(band_keys, len(rows), len(columns))
        width = len(columns) if band_keys is None else band_keys.shape[1]
        if raw.shape[1:] != (len(rows), width) or raw.shape[0] not in (1, len(message.heads)):
            raise bad_answer(f"a map of {len(rows)} queries and {width} keys has weights of shape {raw.shape}")
    return AttentionMap(
        sites=tuple(message.sites),
        layer=message.layer,
        kind=KINDS.get(message.kind, "unknown"),
        form=FORMS.get(message.form, "unknown"),
        heads=tuple(message.heads),
        query_axis=message.query_axis,
        key_axis=message.key_axis,
        query_tokens=rows,
        key_tokens=columns,
        raw=raw,
        residual=residual,
        band_keys=band_keys,
        axis_tokens=axes,
        grids=grids,
        model=model,
        labels=labels,
        values=values,
    )


def _features_of(message: attention_pb2.Attention, names: tuple[str, ...], model: str) -> AttentionFeatures:
    axes = {units.axis: _tokens_of(units) for units in message.axes}
    return AttentionFeatures(model, names, tuple(_site_features(each, axes, names) for each in message.maps))


def _site_features(
    message: attention_pb2.AttentionMap, axes: dict[str, tuple[Token, ...]], names: tuple[str, ...]
) -> SiteFeatures:
    rows = _chosen(axes, message.query_axis, message.query_indices)
    values = to_array(message.features)
    expected = (len(message.heads), len(rows), len(names))
    if values.shape != expected or values.dtype != np.float32 or len(message.sites) != 1:
        raise bad_answer(f"a map has features {values.dtype} of shape {values.shape}, not float32 of shape {expected}")
    return SiteFeatures(
        site=message.sites[0],
        layer=message.layer,
        kind=KINDS.get(message.kind, "unknown"),
        form=FORMS.get(message.form, "unknown"),
        heads=tuple(message.heads),
        query_axis=message.query_axis,
        key_axis=message.key_axis,
        query_tokens=rows,
        key_tokens=_chosen(axes, message.key_axis, message.key_indices),
        names=names,
        values=values,
    )


def _chosen(axes: dict[str, tuple[Token, ...]], axis: str, indices: Any) -> tuple[Token, ...]:
    if axis not in axes:
        raise bad_answer(f"a map has the axis {axis!r}, whose units are missing")
    tokens = axes[axis]
    if not indices:
        return tokens
    if max(indices) >= len(tokens):
        raise bad_answer(f"a map has unit {max(indices)} of the axis {axis!r}, which has {len(tokens)} units")
    return tuple(tokens[index] for index in indices)


def _check_links(links: RawLinks, residual: npt.NDArray[np.float32], rows: int, columns: set[int]) -> None:
    offsets = links.row_offsets
    fits = (
        offsets.ndim == residual.ndim - 1 == links.keys.ndim == links.weights.ndim == 1
        and residual.shape[1] == rows
        and len(offsets) == residual.size + 1
        and bool(np.all(np.diff(offsets) >= 0))
        and offsets[0] == 0
        and offsets[-1] == len(links.keys) == len(links.weights)
    )
    if not fits:
        raise bad_answer("offsets, keys, weights and residual of a map's links have lengths that do not match")
    if not columns.issuperset(links.keys.tolist()):
        raise bad_answer("a link has a key that is not among the map's columns")


def _check_band(band_keys: npt.NDArray[Any], rows: int, columns: int) -> None:
    if band_keys.ndim != 2 or len(band_keys) != rows or band_keys.dtype != np.int32:
        problem = f"the band keys of a map of {rows} queries are {band_keys.dtype} of shape {band_keys.shape}"
        raise bad_answer(problem)
    if band_keys.size and not -1 <= band_keys.min() <= band_keys.max() < columns:
        raise bad_answer(f"the band keys of a map are not all from -1 to {columns - 1}")
