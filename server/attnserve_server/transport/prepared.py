"""A request on its way through the data plane: opened, prepared, answered; and the native form of its answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from attnserve_server.domain.clock import Clock
from attnserve_server.domain.values import EffectiveSelection, SequenceResult
from attnserve_server.model.manifest import Manifest
from attnserve_server.scheduling.catalog import ServedModel, Submitter
from attnserve_server.scheduling.queue import Request
from attnserve_server.transport import codec
from attnserve_server.transport.intake import Intake
from attnserve_server.transport.labels import labels_message
from attnserve_server.transport.quick import QuickReader
from attnserve_server.transport.timings import timings_of
from attnserve_server.transport.validation import ValidRequest
from attnserve_server.transport.wire import Splice


@dataclass(frozen=True, slots=True)
class Reader:
    """How requests to one model are read. `quick`: for usual ones; None if the model has none."""

    intake: Intake
    quick: QuickReader | None
    layouts: dict[str, Any] = field(default_factory=dict)
    """What the adapters of other protocols laid out for the model, by protocol."""


@dataclass(slots=True)
class Opened:
    """A request whose model is known and has room for it; not changed once made.

    Pass it to `DataPlane.read` or, if its message cannot be read, to `DataPlane.refuse`.
    """

    request: Request
    served: ServedModel
    manifest: Manifest
    scheduler: Submitter
    reader: Reader


@dataclass(slots=True)
class Prepared:
    """A request that is valid and may run; not changed once made.

    Pass it to `start` or, if it ends before, to `withdraw`. `validate_only`: it does not run; its answer has the
    predicted size and no results.
    """

    request: Request
    valid: ValidRequest
    served: ServedModel
    manifest: Manifest
    scheduler: Submitter
    validate_only: bool

    @property
    def answer_bytes(self) -> int:
        """Tensor data that the answer will hold; with `min_weight` at most this."""
        return 0 if self.validate_only else self.valid.predicted_bytes


def response_of(prepared: Prepared, results: list[SequenceResult], clock: Clock) -> Splice:
    """Encode the results of a request as its InferResponse. `clock`: times that."""
    served, manifest, valid = prepared.served, prepared.manifest, prepared.valid
    begun = clock.now()
    encoded = [codec.result_of(result, valid.outputs, _labels(result, manifest, served)) for result in results]
    return codec.response_of(
        encoded,
        prepared.request.request_id,
        codec.receipt_of(served.name, served.version, manifest.digest, served.provider, manifest.precision),
        b"" if valid.effective is None else _effective(valid.effective, manifest),
        valid.predicted_bytes,
        timings_of(results, clock.now() - begun).field() if results else b"",
    )


def _effective(effective: EffectiveSelection, manifest: Manifest) -> bytes:
    return codec.effective_bytes(effective, tuple([manifest.sites[layer].name for layer in effective.layers]))


def _labels(result: SequenceResult, manifest: Manifest, served: ServedModel) -> bytes | None:
    """Return the serialized labels of one sequence; None if none were selected."""
    if result.labels is None or manifest.head is None:
        return None
    tokenizer = served.tokenizer
    name_of = tokenizer.token_text if tokenizer is not None else _unnamed
    return labels_message(result.labels, manifest.head, name_of).SerializeToString()


def _unnamed(number: int) -> str:
    """Return an empty text: without a tokenizer, tokens have no names."""
    del number
    return ""
