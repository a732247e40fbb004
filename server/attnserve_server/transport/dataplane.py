"""The data plane behind unary calls and streams: a parsed request in, an answer out, in steps. Opens no stream.

`prepare` validates a request and predicts the size of its answer; `start` submits it to the model's scheduler; `answer`
encodes the results. A caller may wait before `start`, until it has room for the answer. No step is a coroutine, so that
a call is one task, and a request of a stream none; only a large request is prepared in a thread, by `prepare_large`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, TypeVar

from attnserve.v1 import inference_service_pb2, model_pb2

from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import AttnserveError, ModelNotFound, RequestCancelled
from attnserve_server.domain.values import (
    Array,
    AttentionMap,
    Links,
    RowFeatures,
    SequenceResult,
)
from attnserve_server.model.manifest import Manifest
from attnserve_server.scheduling.catalog import Catalog, ModelState, ServedModel, Submitter
from attnserve_server.scheduling.queue import Request
from attnserve_server.transport.description import describe
from attnserve_server.transport.intake import Intake
from attnserve_server.transport.prepared import Opened, Prepared, Reader, response_of
from attnserve_server.transport.quick import QuickReader
from attnserve_server.transport.status import name_of_code
from attnserve_server.transport.validation import ValidRequest, check_model_reference, validate
from attnserve_server.transport.wire import Received, Splice

if TYPE_CHECKING:
    from attnserve_server.observability.tracing import Tracing

T = TypeVar("T")
Encoder = Callable[[Prepared, list[SequenceResult], Clock], T]
"""Encodes the results of a request; the clock times that."""

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


class DataPlane:
    """Answers requests from the catalog's models. Event loop only."""

    tracing: Tracing | None = None
    """Takes spans, in `traced`; here: none."""

    def __init__(self, catalog: Catalog, settings: Settings, clock: Clock) -> None:
        self._catalog = catalog
        self._settings = settings
        self._clock = clock
        self._readers: dict[ServedModel, Reader] = {}
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
        opened = self.open(request, message.model, message.version, runs=not message.validate_only)
        return self.read(opened, received)

    def open(self, request: Request, model: str, version: str, *, runs: bool = True) -> Opened:
        """Find the model of a request, before its inputs are read. Count the request if that fails.

        Args:
            request: in state RECEIVED.
            model: the model's name.
            version: its version; empty: the default one.
            runs: whether the request needs room in the queue.

        Raises:
            AttnserveError: As `prepare`.
        """
        served = self.find(model, version)
        try:
            manifest, scheduler = self._serving(served)
            if runs:
                scheduler.check_room(request.deadline_s, request.caller)
            return Opened(request, served, manifest, scheduler, self._reader(served, manifest))
        except Exception as error:
            self.count_failure(served, request, error)
            raise

    def read(self, opened: Opened, received: Received[inference_service_pb2.InferRequest]) -> Prepared | None:
        """Validate an opened request, as `prepare`."""
        served, request, reader = opened.served, opened.request, opened.reader
        try:
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
        return Prepared(request, valid, served, opened.manifest, opened.scheduler, received.message.validate_only)

    def refuse(self, opened: Opened, error: BaseException) -> None:
        """Count an opened request whose inputs cannot be read."""
        if isinstance(error, AttnserveError):
            opened.served.metrics.refused(error.reason)
        self.count_failure(opened.served, opened.request, error)

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

    def answer(self, prepared: Prepared, results: list[SequenceResult], encode: Encoder[T]) -> T:
        """Encode the results of a request, and count it. For the native form, `encode` is `prepared.response_of`."""
        request, served = prepared.request, prepared.served
        try:
            answer = encode(prepared, results, self._clock)
        except Exception as error:
            self.count_failure(served, request, error)
            raise
        served.metrics.ended("OK")
        if results:
            served.statistics.add(results, request.arrived_s, self._clock.now())
        if prepared.valid.effective is not None:
            _count_attention(served, results)
        return answer

    def run(self, prepared: Prepared) -> Coroutine[Any, Any, Splice]:
        """Do as `run_as` does, and return the answer as its InferResponse."""
        return self.run_as(prepared, response_of)

    async def run_as(self, prepared: Prepared, encode: Encoder[T]) -> T:
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
        return self.answer(prepared, results, encode)

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
        served.statistics.failed += 1

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
        served = self.find(name, version)
        manifest, _ = self._serving(served)
        return manifest, self._reader(served, manifest).intake

    def all(self) -> list[ServedModel]:
        """Return all models in order of name and version."""
        return self._catalog.all()

    def described(self, name: str, version: str) -> tuple[ServedModel, Reader | None]:
        """Return one model, and how its requests are read; None for one that is no bundle.

        Raises:
            InvalidRequest: No model can have this name or version.
            ModelNotFound: There is none.
        """
        served = self.find(name, version)
        return served, None if served.manifest is None else self._reader(served, served.manifest)

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

    def _reader(self, served: ServedModel, manifest: Manifest) -> Reader:
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
            reader = self._readers[served] = Reader(intake, QuickReader.of(intake))
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
