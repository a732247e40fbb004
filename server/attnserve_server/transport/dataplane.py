"""The data plane behind unary calls and streams: a parsed request in, an answer out, in two phases. Opens no stream.

`prepare` validates a request and predicts the size of its answer; `run` submits it to the model's scheduler. A caller
may wait between the two, until it has room for the answer.
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
from attnserve_server.domain.values import Array, AttentionMap, Links, RowFeatures, SequenceResult
from attnserve_server.model.manifest import Manifest
from attnserve_server.scheduling.catalog import Catalog, ModelState, ServedModel, Submitter
from attnserve_server.scheduling.queue import Request
from attnserve_server.transport import codec
from attnserve_server.transport.description import describe
from attnserve_server.transport.intake import Intake
from attnserve_server.transport.labels import labels_message
from attnserve_server.transport.status import name_of_code
from attnserve_server.transport.validation import ValidRequest, check_model_reference, validate
from attnserve_server.transport.wire import Received, Splice

OFFLOAD_TEXT_BYTES: Final = 4096
"""Longer texts are tokenized in a thread: on the event loop they would block it for over 2 ms."""
OFFLOAD_TENSOR_BYTES: Final = 8 * 2**20
"""Larger tensors are checked in a thread, for the same reason."""
_STATES: Final = {
    ModelState.LOADING: model_pb2.MODEL_STATE_LOADING,
    ModelState.READY: model_pb2.MODEL_STATE_READY,
    ModelState.DRAINING: model_pb2.MODEL_STATE_DRAINING,
    ModelState.FAILED: model_pb2.MODEL_STATE_FAILED,
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that is valid and may run. Pass it to `run` or, if it ends before, to `withdraw`.

    `validate_only`: it does not run; its answer has the predicted size and no results.
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


class DataPlane:
    """Answers requests from the catalog's models. Event loop only."""

    def __init__(self, catalog: Catalog, settings: Settings, clock: Clock) -> None:
        self._catalog = catalog
        self._settings = settings
        self._clock = clock
        self._intakes: dict[ServedModel, Intake] = {}
        # One thread: more would take cores from the runs without preparing sequences sooner than runs can use them.
        self._preparing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")

    def close(self) -> None:
        """End the thread that prepares large requests."""
        self._preparing.shutdown(wait=False, cancel_futures=True)

    async def prepare(self, request: Request, received: Received[inference_service_pb2.InferRequest]) -> Prepared:
        """Validate a request, and count it if that fails.

        Args:
            request: in state RECEIVED.
            received: its message.

        Raises:
            AttnserveError: As in the status table. Overload is reported before any work, because work on requests that
                must be retried is taken from the others.
        """
        message = received.message
        served = self._find(message.model, message.version)
        try:
            manifest, scheduler = self._serving(served)
            if not message.validate_only:
                scheduler.check_room(request.deadline_s)
            valid = await self._validated(received, served, manifest)
        except (asyncio.CancelledError, Exception) as error:
            self._count_failure(served, request, error)
            raise
        return Prepared(request, valid, served, manifest, scheduler, message.validate_only)

    async def run(self, prepared: Prepared) -> Splice:
        """Run a prepared request and return its answer, an InferResponse; count how it ended.

        Raises:
            AttnserveError: As in the status table; RequestCancelled if it was cancelled after `prepare`.
        """
        request, valid, served = prepared.request, prepared.valid, prepared.served
        results: list[SequenceResult] = []
        if request.ended:
            self.withdraw(prepared)
            raise RequestCancelled
        try:
            if prepared.validate_only:
                request.answer()
            else:
                results = await prepared.scheduler.submit(request, valid.sequences, valid.priority)
            answer = _response(prepared, results)
        except (asyncio.CancelledError, Exception) as error:
            self._count_failure(served, request, error)
            raise
        served.metrics.ended("OK")
        _count_attention(served, results)
        return answer

    def withdraw(self, prepared: Prepared) -> None:
        """Count a prepared request that is cancelled, or expires, before it runs."""
        self._count_failure(prepared.served, prepared.request, asyncio.CancelledError())

    def _count_failure(self, served: ServedModel, request: Request, error: BaseException) -> None:
        left_s = None if request.deadline_s is None else request.deadline_s - self._clock.now()
        served.metrics.ended(name_of_code(error, left_s))

    def _find(self, model: str, version: str) -> ServedModel:
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

    async def _validated(
        self, received: Received[inference_service_pb2.InferRequest], served: ServedModel, manifest: Manifest
    ) -> ValidRequest:
        intake = self._intake(served, manifest)
        try:
            if not _is_large(received):
                return validate(received, intake)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._preparing, validate, received, intake)
        except AttnserveError as error:
            served.metrics.refused(error.reason)
            raise

    def models(self) -> list[model_pb2.Model]:
        """Return all models in order of name and version."""
        return [self._describe(served) for served in self._catalog.all()]

    def model(self, name: str, version: str) -> model_pb2.Model:
        """Return one model. Raises InvalidRequest and ModelNotFound."""
        return self._describe(self._find(name, version))

    def _describe(self, served: ServedModel) -> model_pb2.Model:
        message = model_pb2.Model(
            name=served.name,
            version=served.version,
            state=_STATES[served.state],
            state_reason=served.state_reason,
            execution_provider=served.provider,
        )
        if served.manifest is not None:
            intake = self._intake(served, served.manifest)
            describe(message, served.manifest, self._settings.batching)
            message.accepts_text = served.manifest.text is not None
            message.max_batch_size = intake.max_batch_size
            message.max_text_bytes = intake.max_text_bytes
            message.max_response_bytes = intake.max_response_bytes
        return message

    def _intake(self, served: ServedModel, manifest: Manifest) -> Intake:
        intake = self._intakes.get(served)
        # A model gets its tokenizer while it loads: an intake that was made before that is replaced.
        if intake is None or intake.tokenizer is not served.tokenizer:
            most = served.max_request_size or manifest.max_batch_size
            intake = Intake.of(
                manifest,
                served.tokenizer,
                max_batch_size=min(self._settings.max_batch_size or most, most),
                max_text_bytes=self._settings.max_text_bytes,
                max_response_bytes=self._settings.max_response_bytes,
            )
            self._intakes[served] = intake
        return intake


def _is_large(received: Received[inference_service_pb2.InferRequest]) -> bool:
    """Return whether validation would block the event loop for long."""
    if received.size <= OFFLOAD_TEXT_BYTES:
        return False
    texts = (sequence.WhichOneof("input") == "text" for sequence in received.message.sequences)
    return received.size > OFFLOAD_TENSOR_BYTES or any(texts)


def _response(prepared: Prepared, results: list[SequenceResult]) -> Splice:
    served, manifest, valid = prepared.served, prepared.manifest, prepared.valid
    return codec.response_of(
        [codec.result_of(result, valid.outputs, _labels(result, manifest, served)) for result in results],
        prepared.request.request_id,
        codec.receipt_of(served.name, served.version, manifest.digest, served.provider, manifest.precision),
        None if valid.effective is None else codec.effective_message(valid.effective, manifest.sites),
        valid.predicted_bytes,
    )


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
