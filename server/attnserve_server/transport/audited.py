"""A data plane that writes one audit line for each request, and what the line holds. With `--audit-log` only.

A line is rendered by the thread that writes it; the data plane only keeps what that needs. A request that names no
model of this server has no line: it is in the log.
"""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
from attnserve.v1 import inference_service_pb2

from attnserve_server.access.guard import CALLER
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.values import Array, EffectiveSelection, RowFeatures, SequenceResult
from attnserve_server.model.manifest import InputRole, Manifest
from attnserve_server.observability.audit import MAX_LINE, Audit, Note
from attnserve_server.scheduling.catalog import ServedModel
from attnserve_server.scheduling.queue import Request
from attnserve_server.transport.dataplane import DataPlane, Encoder
from attnserve_server.transport.prepared import Opened, Prepared
from attnserve_server.transport.status import name_of_code
from attnserve_server.transport.wire import Received

T = TypeVar("T")

KEY_ID: Final = b"attnserve audit key"
"""The message whose HMAC, in part, names a key."""
_RECORD_BYTES: Final = 1024
_JSON: Final = msgspec.json.Encoder()


@dataclass(slots=True, eq=False)
class Features:
    """The row features of one map, (H, L, F), in the order of the selection."""

    sites: tuple[str, ...]
    layer: int
    heads: tuple[int, ...]
    values: Array


@dataclass(slots=True, eq=False)
class Line:
    """One audit line that is not rendered yet. `facts`: its fields before and after those of the sequences."""

    audit: Audit
    size: int
    facts: dict[str, Any]
    note: Note
    ending: dict[str, Any]
    names: tuple[str, ...] = ()
    features: tuple[list[Features], ...] = ()

    def __len__(self) -> int:
        """Return the bytes that it keeps in memory."""
        return self.size

    def render(self) -> bytes:
        """Return the line. What does not fit into `MAX_LINE` is left out, and named: texts, features, sequences."""
        line = self._encoded()
        omitted: list[str] = []
        for part in ("text", "features", "sequences"):
            if len(line) <= MAX_LINE:
                break
            omitted.append(part)
            line = self._encoded(omitted)
        return line

    def _encoded(self, omitted: list[str] | None = None) -> bytes:
        left_out = omitted or []
        facts = dict(self.facts)
        facts["key_id"] = key_id(self.audit.key)
        facts["sequences"] = [] if "sequences" in left_out else self._sequences(left_out)
        if left_out:
            facts["omitted"] = left_out
        return _JSON.encode(facts | self.ending) + b"\n"

    def _sequences(self, omitted: list[str]) -> list[dict[str, Any]]:
        note, key, made = self.note, self.audit.key, []
        for at, tokens in enumerate(note.tokens):
            found: dict[str, Any] = {"tokens": tokens}
            text = note.texts[at] if at < len(note.texts) else None
            if text is not None:
                named = {name: one for name, one in zip(("text", "text_pair"), text, strict=True) if one}
                found["hmac"] = {name: digest_of(key, one.encode()) for name, one in named.items()}
                if self.audit.with_text and "text" not in omitted:
                    found |= named
            else:
                found["hmac"] = {name: digest_of(key, bytes_of(one)) for name, one in note.tensors[at].items()}
            if at < len(self.features) and "features" not in omitted:
                found["features"] = [_summary(one, self.names) for one in self.features[at]]
            made.append(found)
        return made


class AuditedPlane(DataPlane):
    """A data plane that writes an audit line for each request at its end. Event loop only."""

    def __init__(self, *parts: Any, audit: Audit) -> None:
        """As the class that this one comes before. `audit`: takes the lines."""
        super().__init__(*parts)
        self._audit = audit

    def open(self, request: Request, model: str, version: str, *, runs: bool = True) -> Opened:
        """Find the model of a request, as `DataPlane.open`."""
        caller = CALLER.get()
        request.note = Note("" if caller is None else caller.token.name)
        return super().open(request, model, version, runs=runs)

    def read(self, opened: Opened, received: Received[inference_service_pb2.InferRequest]) -> Prepared | None:
        """Validate an opened request, as `DataPlane.read`."""
        prepared = super().read(opened, received)
        if prepared is not None:
            _note_texts(prepared.request, received.message)
        return prepared

    async def prepare_large(self, request: Request, received: Received[inference_service_pb2.InferRequest]) -> Prepared:
        """Validate a large request, as `DataPlane.prepare_large`."""
        prepared = await super().prepare_large(request, received)
        _note_texts(request, received.message)
        return prepared

    def start(self, prepared: Prepared) -> asyncio.Future[list[SequenceResult]]:
        """Submit a prepared request, as `DataPlane.start`."""
        _note_sequences(prepared)
        return super().start(prepared)

    def answer(self, prepared: Prepared, results: list[SequenceResult], encode: Encoder[T]) -> T:
        """Encode the results of a request, as `DataPlane.answer`."""
        answer = super().answer(prepared, results, encode)
        effective = prepared.valid.effective
        features: tuple[list[Features], ...] = ()
        if effective is not None and effective.features:
            features = tuple([_features_of(result) for result in results])
        self._write(prepared.served, prepared.request, "OK", "", prepared, features)
        return answer

    def count_failure(self, served: ServedModel, request: Request, error: BaseException) -> None:
        """Count a request that ended with an error, as `DataPlane.count_failure`."""
        super().count_failure(served, request, error)
        left_s = None if request.deadline_s is None else request.deadline_s - self._clock.now()
        code = name_of_code(error, left_s)
        self._write(served, request, code, error.reason if isinstance(error, AttnserveError) else code)

    def count_refusal(self, prepared: Prepared, cause: str) -> None:
        """Count a prepared request that is refused, as `DataPlane.count_refusal`."""
        super().count_refusal(prepared, cause)
        _note_sequences(prepared)
        self._write(prepared.served, prepared.request, "RESOURCE_EXHAUSTED", cause, prepared)

    def _write(
        self, served: ServedModel, request: Request, status: str, reason: str, prepared: Prepared | None = None,
        features: tuple[list[Features], ...] = (),
    ) -> None:  # fmt: skip
        """Queue the line of a request, once."""
        note, request.note = request.note, None
        if note is None:
            return
        manifest = served.manifest
        effective = None if prepared is None else prepared.valid.effective
        facts: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="microseconds"),  # noqa: TID251 - of the record
            "request_id": request.request_id,
            "caller": note.caller or None,
            "model": served.name,
            "version": served.version,
            "bundle_digest": None if manifest is None else manifest.digest,
            "provider": served.provider or None,
            "precision": None if manifest is None else manifest.precision,
        }
        selection = None
        if prepared is not None and effective is not None:
            selection = selection_of(effective, prepared.manifest)
        ending = {"selection": selection, "reason": reason or None, "status": status}
        if prepared is not None and prepared.validate_only:
            facts["validate_only"] = True
        kept = sum([one.values.nbytes for found in features for one in found])
        line = Line(self._audit, _RECORD_BYTES + request.received_bytes + kept, facts, note, ending)
        if effective is not None and features:
            line.names, line.features = tuple([one.value for one in effective.features]), features
        self._audit.put(line)


def digest_of(key: bytes, content: bytes) -> str:
    """Return the HMAC-SHA256 of a content, 64 hexadecimal digits. Source: RFC 2104, FIPS 180-4."""
    return hmac.digest(key, content, "sha256").hex()


def key_id(key: bytes) -> str:
    """Return what names a key in each line: the first 16 digits of the HMAC of `KEY_ID`."""
    return digest_of(key, KEY_ID)[:16]


def bytes_of(tensor: Array) -> bytes:
    """Return what the HMAC of a tensor covers: integers as little-endian int64, others in their dtype; row-major."""
    array = np.asarray(tensor)
    if array.dtype.kind in "iub":
        return array.astype("<i8").tobytes()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def identifying_inputs(manifest: Manifest) -> tuple[str, ...]:
    """Return the inputs whose HMACs identify a sequence of tensors: those of token ids, or all data without any."""
    ids = tuple([one.name for one in manifest.inputs if one.role is InputRole.TOKEN_IDS])
    return ids or tuple([one.name for one in manifest.inputs if one.role is InputRole.DATA])


def selection_of(effective: EffectiveSelection, manifest: Manifest) -> dict[str, Any]:
    """Return a selection as a line has it: sites by name, no defaults left open; null heads, or queries: all."""
    return {
        "sites": [manifest.sites[layer].name for layer in effective.layers],
        "heads": None if effective.all_heads else effective.heads,
        "head_reduction": effective.head_reduction,
        "layer_reduction": effective.layer_reduction,
        "queries": effective.queries or None,
        "unit": effective.unit,
        "special_tokens": effective.special_tokens,
        "top_k": effective.top_k,
        "min_weight": effective.min_weight,
        "dtype": effective.dtype,
        "features": effective.features,
        "values": effective.values,
    }


def _note_texts(request: Request, message: inference_service_pb2.InferRequest) -> None:
    """Keep the texts of a request, which its prepared sequences do not hold."""
    if request.note is not None:
        found = [
            (one.text.text, one.text.text_pair) if one.WhichOneof("input") == "text" else None
            for one in message.sequences
        ]
        request.note.texts = tuple(found) if any(found) else ()


def _note_sequences(prepared: Prepared) -> None:
    """Keep what identifies the sequences of a request: its texts, or else tensors."""
    note = prepared.request.note
    if note is None:
        return
    names = identifying_inputs(prepared.manifest)
    texts = note.texts or (None,) * len(prepared.valid.sequences)
    note.tokens = tuple([one.tokens for one in prepared.valid.sequences])
    note.tensors = tuple(
        [
            {} if text else {name: one.tensors[name] for name in names if name in one.tensors}
            for text, one in zip(texts, prepared.valid.sequences, strict=True)
        ]
    )


def _features_of(result: SequenceResult) -> list[Features]:
    maps = result.attention.maps if result.attention is not None else ()
    return [
        Features(one.sites, one.layer, one.heads, one.content.values)
        for one in maps
        if isinstance(one.content, RowFeatures)
    ]


def _summary(features: Features, names: tuple[str, ...]) -> dict[str, Any]:
    """Return mean, least and greatest value of each feature over the rows of all heads of a map."""
    heads, rows, _ = features.values.shape
    found: dict[str, Any] = {"sites": features.sites, "layer": features.layer, "heads": features.heads, "rows": rows}
    exact = features.values.reshape(heads * rows, -1).astype(np.float64)
    for at, name in enumerate(names):
        column = exact[:, at]
        found[name] = {"mean": float(column.mean()), "min": float(column.min()), "max": float(column.max())}
    return found
