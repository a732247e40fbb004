"""The data plane behind unary calls and streams: a parsed request in, an answer out, in steps. Opens no stream.

`prepare` validates a request and predicts the size of its answer; `start` submits it to the model's scheduler; `answer`
encodes the results. A caller may wait before `start`, until it has room for the answer. No step is a coroutine, so that
a call is one task, and a request of a stream none; only a large request is prepared in a thread, by `prepare_large`.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from attnserve.v1 import inference_service_pb2, model_pb2

from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import AttnserveError, ModelNotFound, RequestCancelled
from attnserve_server.domain.values import (
    Array,
    AttentionMap,
    EffectiveSelection,
    Links,
    RowFeatures,
    SequenceResult,
)
from attnserve_server.model.manifest import Manifest
from attnserve_server.scheduling.catalog import Catalog, ModelState, ServedModel, Submitter
from attnserve_server.scheduling.queue import Request
from attnserve_server.transport import codec
from attnserve_server.transport.description import describe
from attnserve_server.transport.intake import Intake
from attnserve_server.transport.labels import labels_message
from attnserve_server.transport.quick import QuickReader
from attnserve_server.transport.status import name_of_code
from attnserve_server.transport.timings import timings_of
from attnserve_server.transport.validation import ValidRequest, check_model_reference, validate
from attnserve_server.transport.wire import Received, Splice

OFFLOAD_TEXT_BYTES: Final = 4096
"""Longer texts are tokenized in a thread: on the event loop they would block it for over 2 ms."""
OFFLOAD_TENSOR_BYTES: Final = 8 * 2**20
"""Larger tensors are checked in a thread, for the same reason."""
STATES: Final = {
    ModelState.LOADING: model_pb2.MODEL_STATE_LOADING,
    ModelState.READY: model_pb2.MODEL_STATE_READY,
    ModelState.DRAINING: model_pb2.MODEL_STATE_DRAINING,
    ModelState.FAILED: model_pb2.MODEL_STATE_FAILED,
}


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


@dataclass(frozen=True, slots=True)
class _Reader:
    """How requests to one model are read. `quick`: for usual ones; None if the model has none."""

    intake: Intake
    quick: QuickReader | None


class DataPlane:
    """Answers requests from the catalog's models. Event loop only."""

    def __init__(self, catalog: Catalog, settings: Settings, clock: Clock) -> None:
        self._catalog = catalog
        self._settings = settings
        self._clock = clock
        self._readers: dict[ServedModel, _Reader] = {}
        # One thread: more would take cores from the runs without preparing sequences sooner than runs can use them.
        self._preparing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")

    def close(self) -> None:
        """End the thread that prepares large requests."""
        self._preparing.shutdown(wait=False, cancel_futures=True)

    def prepare(self, request: Request, received: Received[inference_service_pb2.InferRequest]) -> Prepared | None:
        """Validate a request, and count it if that fails.

        Args:
            request: in state RECEIVED.
            received: its message.

        Returns:
            The request; None for a large one, which would block the event loop: pass it to `prepare_large`.

        Raises:
            AttnserveError: As in the status table. Overload is reported before any work, because work on requests that
                must be retried is taken from the others.
        """
        message = received.message
        served = self.find(message.model, message.version)
        try:
            manifest, scheduler = self._serving(served)
            if not message.validate_only:
                scheduler.check_room(request.deadline_s, request.caller)
            reader = self._reader(served, manifest)
            valid = None
            if reader.quick is not None and received.size <= OFFLOAD_TENSOR_BYTES:
                valid = reader.quick.read(received)
            if valid is None:
                if _is_large(received):
                    return None
                valid = _checked(received, reader.intake, served)
        except Exception as error:
            self.count_failure(served, request, error)
            raise
        served.prepared += 1
        return Prepared(request, valid, served, manifest, scheduler, message.validate_only)

    async def prepare_large(self, request: Request, received: Received[inference_service_pb2.InferRequest]) -> Prepared:
        """Do as `prepare` does, in a thread."""
        message = received.message
        served = self.find(message.model, message.version)
        served.prepared += 1
        try:
            manifest, scheduler = self._serving(served)
            intake = self._reader(served, manifest).intake
            loop = asyncio.get_running_loop()
            valid = await loop.run_in_executor(self._preparing, _checked, received, intake, served)
        except (asyncio.CancelledError, Exception) as error:
            served.prepared -= 1
            self.count_failure(served, request, error)
            raise
        return Prepared(request, valid, served, manifest, scheduler, message.validate_only)

    def start(self, prepared: Prepared) -> asyncio.Future[list[SequenceResult]]:
        """Submit a prepared request, and return the future of its results. Count it if that fails.

        Pass what the future holds to `answer`, or to `count_failure` what it raises.

        Raises:
            AttnserveError: As in the status table; RequestCancelled if it was cancelled after `prepare`.
        """
        request = prepared.request
        if request.ended:
            self.withdraw(prepared)
            raise RequestCancelled
        prepared.served.prepared -= 1
        if prepared.validate_only:
            request.answer()
            done: asyncio.Future[list[SequenceResult]] = asyncio.get_running_loop().create_future()
            done.set_result([])
            return done
        try:
            return prepared.scheduler.submit(request, prepared.valid.sequences, prepared.valid.priority)
        except Exception as error:
            self.count_failure(prepared.served, request, error)
            raise

    def answer(self, prepared: Prepared, results: list[SequenceResult]) -> Splice:
        """Encode the results of a request as its InferResponse, and count it."""
        try:
            answer = _response(prepared, results, self._clock)
        except Exception as error:
            self.count_failure(prepared.served, prepared.request, error)
            raise
        prepared.served.metrics.ended("OK")
        if prepared.valid.effective is not None:
            _count_attention(prepared.served, results)
        return answer

    async def run(self, prepared: Prepared) -> Splice:
        """Start a prepared request, wait for its results, and return its answer; count how it ended.

        Raises:
            AttnserveError: As in the status table; RequestCancelled if it was cancelled after `prepare`.
        """
        started = self.start(prepared)
        try:
            results = await started
        except (asyncio.CancelledError, Exception) as error:
            self.count_failure(prepared.served, prepared.request, error)
            raise
        return self.answer(prepared, results)

    def withdraw(self, prepared: Prepared) -> None:
        """Count a prepared request that is cancelled, or expires, before it runs."""
        prepared.served.prepared -= 1
        self.count_failure(prepared.served, prepared.request, asyncio.CancelledError())

    def count_refusal(self, prepared: Prepared, cause: str) -> None:
        """Count a prepared request that is refused before it runs, for a cause of overload."""
        prepared.served.prepared -= 1
        prepared.served.metrics.refused(cause)
        prepared.served.metrics.ended("RESOURCE_EXHAUSTED")

    def count_failure(self, served: ServedModel, request: Request, error: BaseException) -> None:
        """Count a request that ended with an error, by the status that its caller gets."""
        left_s = None if request.deadline_s is None else request.deadline_s - self._clock.now()
        served.metrics.ended(name_of_code(error, left_s))

    def forget(self, served: ServedModel) -> None:
        """Free what requests to a model were read with, once the catalog does not have it."""
        self._readers.pop(served, None)

    def find(self, model: str, version: str = "") -> ServedModel:
        """Return the model. Raises InvalidRequest and ModelNotFound."""
        try:
            return self._catalog.find(model, version)
        except ModelNotFound:
            # Names in the catalog are valid: only others need a check.
            check_model_reference(model, version)
            raise

    def _serving(self, served: ServedModel) -> tuple[Manifest, Submitter]:
        try:
            return served.serving()
        except AttnserveError as error:
            served.metrics.refused(error.reason)
            raise

    def models(self) -> list[model_pb2.Model]:
        """Return all models in order of name and version."""
        return [self._describe(served) for served in self._catalog.all()]

    def model(self, name: str, version: str) -> model_pb2.Model:
        """Return one model. Raises InvalidRequest and ModelNotFound."""
        return self._describe(self.find(name, version))

    def versions(self, name: str) -> list[ServedModel]:
        """Return all versions of a model, or of all if `name` is empty. Raises InvalidRequest and ModelNotFound."""
        if name:
            self.find(name)
        return [served for served in self._catalog.all() if name in ("", served.name)]

    def reading(self, name: str, version: str) -> tuple[Manifest, Intake]:
        """Return what a model that serves accepts. Raises InvalidRequest, ModelNotFound, NotServing and ModelFailed."""
        served = self._find(name, version)
        manifest, _ = self._serving(served)
        return manifest, self._reader(served, manifest).intake

    def _describe(self, served: ServedModel) -> model_pb2.Model:
        message = model_pb2.Model(
            name=served.name,
            version=served.version,
            state=STATES[served.state],
            state_reason=served.state_reason,
            execution_provider=served.provider,
        )
        if served.manifest is not None:
            intake = self._reader(served, served.manifest).intake
            describe(message, served.manifest, self._settings.batching)
            message.accepts_text = served.manifest.text is not None
            message.max_batch_size = intake.max_batch_size
            message.max_text_bytes = intake.max_text_bytes
            message.max_response_bytes = intake.max_response_bytes
        return message

    def _reader(self, served: ServedModel, manifest: Manifest) -> _Reader:
        reader = self._readers.get(served)
        # A model gets its tokenizer while it loads: an intake that was made before that is replaced.
        if reader is None or reader.intake.tokenizer is not served.tokenizer:
            most = served.max_request_size or manifest.max_batch_size
            intake = Intake.of(
                manifest,
                served.tokenizer,
                max_batch_size=min(self._settings.max_batch_size or most, most),
                max_text_bytes=self._settings.max_text_bytes,
                max_response_bytes=self._settings.max_response_bytes,
            )
            reader = self._readers[served] = _Reader(intake, QuickReader.of(intake))
        return reader


def _checked(
    received: Received[inference_service_pb2.InferRequest], intake: Intake, served: ServedModel
) -> ValidRequest:
    """Return the request as `validate` reads it; count it if it is refused."""
    try:
        return validate(received, intake)
    except AttnserveError as error:
        served.metrics.refused(error.reason)
        raise


def _is_large(received: Received[inference_service_pb2.InferRequest]) -> bool:
    """Return whether validation would block the event loop for long."""
    if received.size <= OFFLOAD_TEXT_BYTES:
        return False
    texts = (sequence.WhichOneof("input") == "text" for sequence in received.message.sequences)
    return received.size > OFFLOAD_TENSOR_BYTES or any(texts)


def _response(prepared: Prepared, results: list[SequenceResult], clock: Clock) -> Splice:
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


def _count_attention(served: ServedModel, results: list[SequenceResult]) -> None:
    for result in results:
        for found in result.attention.maps if result.attention else ():
            served.metrics.attention_bytes(found.form).inc(_bytes_of(found))


def _bytes_of(found: AttentionMap) -> int:
    content = found.content
    arrays: tuple[Array, ...]
    match content:
        case Links():
            arrays = content.row_offsets, content.keys, content.weights, content.residual
        case RowFeatures():
            arrays = (content.values,)
        case _:
            arrays = (content,)
    return sum(array.nbytes for array in arrays)
