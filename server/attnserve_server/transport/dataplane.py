"""The data plane behind every transport: a parsed request in, an answer out. No streams, RPCs or statuses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Final
from uuid import uuid4

from attnserve.v1 import inference_service_pb2, model_pb2

from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import AttnserveError, InternalFault, ModelNotFound, NotServing, Overloaded
from attnserve_server.domain.values import Array, AttentionMap, Links, SequenceResult
from attnserve_server.model.manifest import Manifest
from attnserve_server.observability.logs import logger
from attnserve_server.scheduling.catalog import Catalog, ModelState, ServedModel
from attnserve_server.transport import codec
from attnserve_server.transport.description import describe
from attnserve_server.transport.inputs import Intake
from attnserve_server.transport.splice import Splice
from attnserve_server.transport.status import is_fault, plain, row_of
from attnserve_server.transport.structure import Blobs
from attnserve_server.transport.validation import PreparedRequest, check_model_reference, check_request_id, prepare

_log = logger(__name__)

Reserve = Callable[[int], Awaitable[None]]

OFFLOAD_TEXT_BYTES: Final = 4096
"""Texts of more than this are tokenized in a thread: the loop would stand still for over 2 ms."""
OFFLOAD_TENSOR_BYTES: Final = 8 * 2**20
"""Tensors of more than this are checked in a thread, for the same reason."""
DEADLINE_SLACK_S: Final = 0.005
"""gRPC keeps a caller's deadline on a clock of its own, so it may end a call this much before ours has come to it."""
_STATES: Final = {
    ModelState.LOADING: model_pb2.MODEL_STATE_LOADING,
    ModelState.READY: model_pb2.MODEL_STATE_READY,
    ModelState.DRAINING: model_pb2.MODEL_STATE_DRAINING,
    ModelState.FAILED: model_pb2.MODEL_STATE_FAILED,
}


_OURS: Final = uuid4().hex[:16]
_NUMBERS: Final = count()
"""Names of requests that came without one: this process's, and a number. Drawing a random one for each costs a system
call, and nobody needs it to be hard to guess."""


class DataPlane:
    """Answers requests from the catalog's models. Event loop only."""

    def __init__(self, catalog: Catalog, settings: Settings, clock: Clock) -> None:
        self._catalog = catalog
        self._settings = settings
        self._clock = clock
        self._intakes: dict[ServedModel, Intake] = {}
        # One thread: more would take cores from the runs without making tokens come sooner than runs can use them.
        self._preparing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")

    def close(self) -> None:
        """Ends the thread that prepares large requests."""
        self._preparing.shutdown(wait=False, cancel_futures=True)

    async def infer(
        self,
        request: inference_service_pb2.InferRequest,
        request_id: str,
        deadline: float | None,
        size: int,
        blobs: Blobs = (),
        reserve: Reserve | None = None,
    ) -> Splice:
        """Checks, runs and answers one request, and counts how it ended. Returns an InferResponse.

        Args:
            request: What was asked.
            request_id: Its name: the caller's, or one that `name_of` made.
            deadline: Monotonic seconds; None: the caller waits forever.
            size: Bytes that the request came in: the message itself would have to be written again to tell.
            blobs: Its tensors' data, where it was parsed in place.
            reserve: Waits until there is room for an answer of so many bytes; None: there always is.

        Raises:
            AttnserveError: Whatever the status table has a row for.
        """
        served = self._find(request.model, request.version)
        started = False
        try:
            manifest, scheduler = served.serving()
            if not request.validate_only:
                # Overload is told before any work: what is spent on those who must come back is taken from the others.
                started = True
                scheduler.check_room(deadline)
                started = False
            prepared = await self._prepare(request, size, self._intake(served, manifest), blobs)
            results: list[SequenceResult] = []
            if not request.validate_only:
                if reserve is not None:
                    await reserve(prepared.predicted_bytes)
                started = True
                results = await scheduler.submit(
                    prepared.sequences,
                    deadline=deadline,
                    priority=prepared.priority,
                    received_bytes=size,
                    request_id=request_id,
                )
            response = _response(served, manifest, request_id, prepared, results)
        except asyncio.CancelledError:
            served.metrics.ended("DEADLINE_EXCEEDED" if self._is_past(deadline) else "CANCELLED")
            raise
        except Exception as error:
            served.metrics.ended(row_of(error).code.name)
            if not started and isinstance(error, AttnserveError):
                served.metrics.refused(error.reason)
            raise
        served.metrics.ended("OK")
        _count_attention(served, results)
        return response

    def _find(self, model: str, version: str) -> ServedModel:
        """The model. Raises InvalidRequest and ModelNotFound."""
        try:
            return self._catalog.find(model, version)
        except ModelNotFound:
            # What the catalog knows is a valid name; only what it does not know need be looked at.
            check_model_reference(model, version)
            raise

    def _is_past(self, deadline: float | None) -> bool:
        """Whether a deadline ended a call: gRPC cancels its handler then, just as when the caller leaves."""
        return deadline is not None and self._clock.now() >= deadline - DEADLINE_SLACK_S

    async def _prepare(
        self, request: inference_service_pb2.InferRequest, size: int, intake: Intake, blobs: Blobs
    ) -> PreparedRequest:
        if not _is_large(request, size):
            return prepare(request, intake, blobs)
        return await asyncio.get_running_loop().run_in_executor(self._preparing, prepare, request, intake, blobs)

    def models(self) -> list[model_pb2.Model]:
        """All models in order of name and version."""
        return [self._describe(served) for served in self._catalog.all()]

    def model(self, name: str, version: str) -> model_pb2.Model:
        """One model. Raises InvalidRequest and ModelNotFound."""
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
        # A model gets its tokenizer while it loads: an intake made before that is made again.
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


def name_of(request_id: str) -> str:
    """The request's name: the caller's, or a new one. Raises InvalidRequest if the caller's may not be echoed."""
    if not request_id:
        return f"{_OURS}{next(_NUMBERS):016x}"
    check_request_id(request_id)
    return request_id


def log_failure(error: BaseException, request_id: str, method: str) -> None:
    """Logs how a request failed: a caller's fault at info, ours with its traceback. Call it once, at the boundary.

    Refusals for overload and while draining are told at debug: there are metrics for them, and they come by the hundred
    a second, just when there is no time to write lines.
    """
    quiet = isinstance(error, Overloaded | NotServing)
    if quiet and not logging.getLogger().isEnabledFor(logging.DEBUG):
        return
    if is_fault(error):
        # An InternalFault was logged with its traceback where it happened.
        trace = None if isinstance(error, InternalFault) else error
        _log.error("request failed", request_id=plain(request_id), method=method, exc_info=trace)
        return
    reason = error.reason if isinstance(error, AttnserveError) else type(error).__name__
    level = _log.debug if quiet else _log.info
    level("request refused", request_id=plain(request_id), method=method, reason=reason, error=plain(str(error), 512))


def _is_large(request: inference_service_pb2.InferRequest, size: int) -> bool:
    # What is small needs no closer look.
    if size <= OFFLOAD_TEXT_BYTES:
        return False
    return size > OFFLOAD_TENSOR_BYTES or any(sequence.WhichOneof("input") == "text" for sequence in request.sequences)


def _response(
    served: ServedModel,
    manifest: Manifest,
    request_id: str,
    prepared: PreparedRequest,
    results: list[SequenceResult],
) -> Splice:
    return codec.response_of(
        [codec.result_of(result, prepared.outputs) for result in results],
        request_id,
        codec.receipt_of(served.name, served.version, manifest.digest, served.provider, manifest.precision),
        None if prepared.effective is None else codec.effective_message(prepared.effective, manifest.sites),
        prepared.predicted_bytes,
    )


def _count_attention(served: ServedModel, results: list[SequenceResult]) -> None:
    for result in results:
        for found in result.attention.maps if result.attention else ():
            served.metrics.attention_bytes(found.form).inc(_bytes_of(found))


def _bytes_of(found: AttentionMap) -> int:
    content = found.content
    arrays: tuple[Array, ...] = (
        (content.row_offsets, content.keys, content.weights, content.residual)
        if isinstance(content, Links)
        else (content,)
    )
    return sum(array.nbytes for array in arrays)
