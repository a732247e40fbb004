"""The client for asyncio: the twin of `_client`. What both decide lives in the modules they share."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar, overload

import grpc
import grpc.aio
from attnserve.v1 import inference_service_pb2 as wire
from attnserve.v1 import inference_service_pb2_grpc

from attnserve_client._async_stream import Feed
from attnserve_client._async_stream import watch as watching
from attnserve_client._channel import metadata_of, options_of, target_of
from attnserve_client._client import DEFAULT_TARGET, DEFAULT_TIMEOUT_S, MAX_IN_FLIGHT, READY_TIMEOUT_S
from attnserve_client._exchange import Exchange, Flow, Ordering
from attnserve_client._inputs import Input, Inputs, Priority, check_timeout, request_of, sequence_of, split, takes_ids
from attnserve_client._models import ModelInfo, is_ready, model_of
from attnserve_client._results import InferenceResult, StreamAnswer, results_of
from attnserve_client._retry import Retrying, RetryPolicy
from attnserve_client._selection import AttentionSelection
from attnserve_client._status import closed, from_rpc_error
from attnserve_client.errors import AttnserveError, DeadlineExpired, InvalidRequest, ModelNotFound, NotServing

_A = TypeVar("_A")
_Q = TypeVar("_Q")


class AsyncClient:
    """Talks to an attnserve server from one event loop. Use it as an async context manager, or await `close`.

        async with AsyncClient("localhost:8001") as client:
            result = await client.infer("minilm", "a sentence", attention=True)

    The channel is made with the first call, in the loop that calls. The arguments are those of `Client`.
    """

    def __init__(
        self,
        target: str | Sequence[str] = DEFAULT_TARGET,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        metadata: Sequence[tuple[str, str | bytes]] = (),
        retry: RetryPolicy | None = None,
        options: Mapping[str, int | str] | None = None,
    ) -> None:
        self._target, self._options = target_of(target), options_of(options or {})
        self._credentials = credentials
        self._metadata = metadata_of(token, metadata)
        self._retrying = Retrying.of(retry or RetryPolicy())
        self._sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
        # Event loop only, all of these.
        self._described: dict[tuple[str, str], ModelInfo] = {}
        self._channel: grpc.aio.Channel | None = None
        self._made: inference_service_pb2_grpc.InferenceServiceAsyncStub | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends all calls under way and closes the connections. Awaiting it again does nothing."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    @overload
    async def infer(  # type: ignore[overload-overlap] # a list of ids is one input, any other list is several
        self,
        model: str,
        inputs: Input,
        *,
        version: str = ...,
        outputs: Sequence[str] | None = ...,
        attention: AttentionSelection | bool | None = ...,
        priority: Priority = ...,
        timeout: float | None = ...,  # noqa: ASYNC109 - as below
        request_id: str | None = ...,
        validate_only: bool = ...,
    ) -> InferenceResult: ...

    @overload
    async def infer(
        self,
        model: str,
        inputs: Sequence[Input],
        *,
        version: str = ...,
        outputs: Sequence[str] | None = ...,
        attention: AttentionSelection | bool | None = ...,
        priority: Priority = ...,
        timeout: float | None = ...,  # noqa: ASYNC109 - as below
        request_id: str | None = ...,
        validate_only: bool = ...,
    ) -> list[InferenceResult]: ...

    async def infer(  # noqa: PLR0913 - everything but model and inputs is passed by name
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = "",
        outputs: Sequence[str] | None = None,
        attention: AttentionSelection | bool | None = None,
        priority: Priority = "normal",
        timeout: float | None = DEFAULT_TIMEOUT_S,  # noqa: ASYNC109 - it becomes the call's deadline, for the server too
        request_id: str | None = None,
        validate_only: bool = False,
    ) -> InferenceResult | list[InferenceResult]:
        """Runs one sequence, or a list of them as one request; the rest is as with `Client.infer`.

        Cancelling the awaiting task cancels the request on the server.
        """
        check_timeout(timeout)
        items, many = split(inputs)
        with_ids = takes_ids(items)
        started = self._retrying.clock()
        description = await self._description(model, version, timeout) if with_ids else None
        request_id = request_id or uuid.uuid4().hex
        request = request_of(
            model=model,
            version=version,
            sequences=[sequence_of(each, description) for each in items],
            outputs=outputs,
            attention=attention,
            priority=priority,
            request_id=request_id,
            validate_only=validate_only,
        )
        left = None if timeout is None else max(0.0, timeout - (self._retrying.clock() - started))
        try:
            answer = await self._call(self._stub.Infer, request, left, request_id)
        except InvalidRequest:
            self._described.pop((model, version), None)  # it may have been another model's by now
            raise
        results = results_of(answer, len(items), validate_only=validate_only)
        return results if many else results[0]

    def stream(  # noqa: PLR0913 - everything but model and inputs is passed by name
        self,
        model: str,
        inputs: Iterable[Input] | AsyncIterable[Input],
        *,
        version: str = "",
        outputs: Sequence[str] | None = None,
        attention: AttentionSelection | bool | None = None,
        priority: Priority = "normal",
        timeout: float | None = DEFAULT_TIMEOUT_S,
        validate_only: bool = False,
        ordered: bool = True,
        max_in_flight: int = MAX_IN_FLIGHT,
        per_message: int = 1,
    ) -> AsyncIterator[StreamAnswer]:
        """Runs many sequences over one stream. Arguments, answers and errors are those of `Client.stream`.

        `inputs` may be an async iterable too; a plain one must not block.
        """
        check_timeout(timeout)

        async def sequence(one: Input) -> wire.Sequence:
            return sequence_of(one, await self._description(model, version, timeout) if takes_ids([one]) else None)

        def message(group: list[wire.Sequence]) -> wire.InferRequest:
            return request_of(
                model=model,
                version=version,
                sequences=group,
                outputs=outputs,
                attention=attention,
                priority=priority,
                request_id="",
                validate_only=validate_only,
            )

        exchange = Exchange(timeout, validate_only=validate_only)
        return self._answers(
            Feed(inputs, sequence, message, exchange, Flow(max_in_flight, per_message)),
            exchange,
            Ordering(ordered=ordered),
        )

    async def models(self, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> list[ModelInfo]:  # noqa: ASYNC109 - as above
        """All models that the server has, in order of name and version."""
        answer = await self._call(self._stub.ListModels, wire.ListModelsRequest(), timeout)
        return [model_of(each) for each in answer.models]

    async def model(
        self,
        name: str,
        version: str = "",
        *,
        timeout: float | None = DEFAULT_TIMEOUT_S,  # noqa: ASYNC109 - as above
    ) -> ModelInfo:
        """One model; with an empty version the highest.

        Raises:
            ModelNotFound: There is none of that name and version.
        """
        request = wire.GetModelRequest(model=name, version=str(version))
        return model_of((await self._call(self._stub.GetModel, request, timeout)).model)

    async def ready(self, model: str | None = None, *, timeout: float = READY_TIMEOUT_S) -> bool:  # noqa: ASYNC109 - as above
        """Whether a model answers; without a name, whether the server has models and the highest version of each does.

        One attempt: a server that cannot be reached, or does not answer in time, is not ready.
        """
        try:
            if model is None:
                listed = await self._attempt(self._stub.ListModels, wire.ListModelsRequest(), timeout)
                return is_ready([model_of(each) for each in listed.models])
            described = await self._attempt(self._stub.GetModel, wire.GetModelRequest(model=model), timeout)
            return model_of(described.model).ready
        except (NotServing, ModelNotFound, DeadlineExpired):
            return False

    @property
    def _stub(self) -> inference_service_pb2_grpc.InferenceServiceAsyncStub:
        if self._closed:
            raise closed()
        if self._made is None:
            # Here and not in the constructor: a channel belongs to the loop that runs when it is made.
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self._target, self._options)
            else:
                self._channel = grpc.aio.secure_channel(self._target, self._credentials, self._options)
            self._made = inference_service_pb2_grpc.InferenceServiceStub(self._channel)
        return self._made

    async def _description(self, model: str, version: str, timeout: float | None) -> ModelInfo:  # noqa: ASYNC109 - as above
        known = self._described.get((model, version))
        if known is None:
            known = self._described[model, version] = await self.model(model, version, timeout=timeout)
        return known

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Q, _A],
        request: _Q,
        timeout: float | None,  # noqa: ASYNC109 - as above
        request_id: str = "",
    ) -> _A:
        """Sends a request until it is answered, final in its failure, or out of time."""
        check_timeout(timeout if timeout != 0 else None)
        attempts = self._retrying.call(timeout)
        while True:
            try:
                answer = await self._attempt(method, request, attempts.remaining_s(), request_id)
            except AttnserveError as error:
                wait_s = attempts.wait_after(error)
                if wait_s is None:
                    raise
            else:
                attempts.succeeded()
                return answer
            await self._sleep(wait_s)

    async def _attempt(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Q, _A],
        request: _Q,
        timeout: float | None,  # noqa: ASYNC109 - as above
        request_id: str = "",
    ) -> _A:
        if self._closed:
            raise closed()
        try:
            return await method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, request_id) from error
        except asyncio.CancelledError:
            self._tell_closed_from_cancelled()
            raise

    async def _answers(self, feed: Feed, exchange: Exchange, ordering: Ordering) -> AsyncIterator[StreamAnswer]:
        call = self._stub.StreamInfer(feed.messages(), metadata=self._metadata)
        watch = asyncio.create_task(watching(exchange, call.cancel))
        try:
            exchange.reading()
            async for message in call:
                for answer in exchange.take(message):
                    for ready in ordering.add(answer):
                        yield ready
                        feed.answered()
                exchange.reading()
            exchange.check_done()
            if feed.error is not None:
                raise feed.error
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        except asyncio.CancelledError:  # grpc.aio's word for a call that this side has ended
            if watch.done() and watch.result():
                raise exchange.stalled() from None
            self._tell_closed_from_cancelled()
            raise
        finally:
            watch.cancel()
            call.cancel()
            feed.close()

    def _tell_closed_from_cancelled(self) -> None:
        """grpc.aio says CancelledError for both; only a cancelled task may end by it."""
        task = asyncio.current_task()
        if self._closed and (task is None or not task.cancelling()):
            raise closed() from None
