"""The client for threads. Its twin for asyncio is `_async_client`; what both decide lives in the modules they share.

Both pass 300 lines by their signatures and docstrings alone, which belong where callers look for them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Final, Self, TypeVar, overload

import grpc
from attnserve.v1 import inference_service_pb2 as wire
from attnserve.v1 import inference_service_pb2_grpc

from attnserve_client._channel import metadata_of, options_of, target_of
from attnserve_client._exchange import Exchange, Flow, Ordering
from attnserve_client._inputs import Input, Inputs, Priority, check_timeout, request_of, sequence_of, split, takes_ids
from attnserve_client._models import ModelInfo, is_ready, model_of
from attnserve_client._results import InferenceResult, StreamAnswer, results_of
from attnserve_client._retry import Retrying, RetryPolicy
from attnserve_client._selection import AttentionSelection
from attnserve_client._status import closed, from_rpc_error
from attnserve_client._stream import Feed, Watch
from attnserve_client.errors import AttnserveError, DeadlineExpired, InvalidRequest, ModelNotFound, NotServing

DEFAULT_TARGET: Final = "localhost:8001"
DEFAULT_TIMEOUT_S: Final = 30.0
READY_TIMEOUT_S: Final = 5.0
MAX_IN_FLIGHT: Final = 128
"""Requests of one stream that may be under way: enough for full batches, and a bound on what both sides hold."""

_A = TypeVar("_A")
_Q = TypeVar("_Q")


class Client:
    """Talks to an attnserve server. Threads may share it; use it as a context manager, or call `close`.

        with Client("localhost:8001") as client:
            result = client.infer("minilm", "a sentence", attention=AttentionSelection(layers=[-1], heads="mean"))
            print(result.outputs["embedding"], result.attention[0].links())

    Args:
        target: `host:port`, any gRPC name, or a list of `address:port` between which calls are spread.
        credentials: TLS credentials from `grpc.ssl_channel_credentials`; None talks in the clear.
        token: Sent as a bearer token with every call.
        metadata: Further metadata for every call.
        retry: When requests are sent again; `RetryPolicy(max_attempts=1)` never does.
        options: gRPC channel options over this client's defaults.
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
        name, arguments = target_of(target), options_of(options or {})
        if credentials is None:
            self._channel = grpc.insecure_channel(name, arguments)
        else:
            self._channel = grpc.secure_channel(name, credentials, arguments)
        self._stub = inference_service_pb2_grpc.InferenceServiceStub(self._channel)
        self._metadata = metadata_of(token, metadata)
        self._retrying = Retrying.of(retry or RetryPolicy())
        self._sleep: Callable[[float], None] = time.sleep
        self._described: dict[tuple[str, str], ModelInfo] = {}  # any thread; single dict operations only
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all calls under way and closes the connections. Calling it again does nothing."""
        self._closed = True
        self._channel.close()

    @overload
    def infer(  # type: ignore[overload-overlap] # a list of ids is one input, any other list is several
        self,
        model: str,
        inputs: Input,
        *,
        version: str = ...,
        outputs: Sequence[str] | None = ...,
        attention: AttentionSelection | bool | None = ...,
        priority: Priority = ...,
        timeout: float | None = ...,
        request_id: str | None = ...,
        validate_only: bool = ...,
    ) -> InferenceResult: ...

    @overload
    def infer(
        self,
        model: str,
        inputs: Sequence[Input],
        *,
        version: str = ...,
        outputs: Sequence[str] | None = ...,
        attention: AttentionSelection | bool | None = ...,
        priority: Priority = ...,
        timeout: float | None = ...,
        request_id: str | None = ...,
        validate_only: bool = ...,
    ) -> list[InferenceResult]: ...

    def infer(  # noqa: PLR0913 - everything but model and inputs is passed by name
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = "",
        outputs: Sequence[str] | None = None,
        attention: AttentionSelection | bool | None = None,
        priority: Priority = "normal",
        timeout: float | None = DEFAULT_TIMEOUT_S,
        request_id: str | None = None,
        validate_only: bool = False,
    ) -> InferenceResult | list[InferenceResult]:
        """Runs one sequence, or a list of them as one request: all succeed or none.

        Args:
            model: The model's name.
            inputs: A text, a pair of texts, token ids, or arrays by input name without the batch axis; or a list.
            version: The model's version; empty for the highest.
            outputs: Names of the wanted outputs; None for all, an empty list for none.
            attention: What part of the attention to bring; True for all of it, None for nothing.
            priority: `"low"`, `"normal"` or `"high"`.
            timeout: Seconds until `DeadlineExpired`, all attempts together; None waits for ever.
            request_id: A name for this request, for the answer, errors and the server's log; None makes one.
            validate_only: Only check the request and predict the bytes of its answer; runs nothing.

        Returns:
            A result for one input, a list of results for a list.

        Raises:
            AttnserveError: One of its subclasses, see `attnserve_client.AttnserveError`.
            TypeError: An argument can be no input, selection or list of outputs.
        """
        check_timeout(timeout)
        items, many = split(inputs)
        with_ids = takes_ids(items)
        started = self._retrying.clock()
        description = self._description(model, version, timeout) if with_ids else None
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
            answer = self._call(self._stub.Infer, request, left, request_id)
        except InvalidRequest:
            self._described.pop((model, version), None)  # it may have been another model's by now
            raise
        results = results_of(answer, len(items), validate_only=validate_only)
        return results if many else results[0]

    def stream(  # noqa: PLR0913 - everything but model and inputs is passed by name
        self,
        model: str,
        inputs: Iterable[Input],
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
    ) -> Iterator[StreamAnswer]:
        """Runs many sequences over one stream: the cheapest way for many, and the one for very large answers.

        Inputs are taken as there is room for them, in a thread of the stream's own; answers come while others are under
        way. One input's failure is that input's answer. A stream that breaks raises; what `inputs` raises, or an input
        that cannot be sent, ends it when all before it are answered. Nothing is sent twice. A stream on which nothing
        comes for longer than `timeout` ends with `DeadlineExpired`.

        Args:
            model: The model's name.
            inputs: Texts, pairs of texts, token ids, or arrays by input name, for as long as it gives any.
            version: The model's version; empty for the highest.
            outputs: Names of the wanted outputs; None for all, an empty list for none.
            attention: What part of the attention to bring; True for all of it, None for nothing.
            priority: `"low"`, `"normal"` or `"high"`.
            timeout: Seconds that each input's answer may take; None waits for ever.
            validate_only: Only check the inputs and predict the bytes of their answers; runs nothing.
            ordered: Give answers in the order of the inputs; False gives them as they are ready.
            max_in_flight: Most inputs that are taken and not yet answered.
            per_message: How many inputs travel in one message, at most the model's `max_batch_size`. For bulk work,
                where messages cost more than waiting does: inputs of one message succeed or fail together.

        Yields:
            An answer for each input, with `index`, `request_id`, and `result` or `error`.

        Raises:
            AttnserveError: The stream broke.
        """
        check_timeout(timeout)

        def sequence(one: Input) -> wire.Sequence:
            return sequence_of(one, self._description(model, version, timeout) if takes_ids([one]) else None)

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

    def models(self, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> list[ModelInfo]:
        """All models that the server has, in order of name and version."""
        answer = self._call(self._stub.ListModels, wire.ListModelsRequest(), timeout)
        return [model_of(each) for each in answer.models]

    def model(self, name: str, version: str = "", *, timeout: float | None = DEFAULT_TIMEOUT_S) -> ModelInfo:
        """One model; with an empty version the highest.

        Raises:
            ModelNotFound: There is none of that name and version.
        """
        request = wire.GetModelRequest(model=name, version=str(version))
        return model_of(self._call(self._stub.GetModel, request, timeout).model)

    def ready(self, model: str | None = None, *, timeout: float = READY_TIMEOUT_S) -> bool:
        """Whether a model answers; without a name, whether the server has models and the highest version of each does.

        One attempt: a server that cannot be reached, or does not answer in time, is not ready.
        """
        try:
            if model is None:
                listed = self._attempt(self._stub.ListModels, wire.ListModelsRequest(), timeout)
                return is_ready([model_of(each) for each in listed.models])
            described = self._attempt(self._stub.GetModel, wire.GetModelRequest(model=model), timeout)
            return model_of(described.model).ready
        except (NotServing, ModelNotFound, DeadlineExpired):
            return False

    def _description(self, model: str, version: str, timeout: float | None) -> ModelInfo:
        known = self._described.get((model, version))
        if known is None:
            known = self._described[model, version] = self.model(model, version, timeout=timeout)
        return known

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable[_Q, _A], request: _Q, timeout: float | None, request_id: str = ""
    ) -> _A:
        """Sends a request until it is answered, final in its failure, or out of time."""
        check_timeout(timeout if timeout != 0 else None)
        attempts = self._retrying.call(timeout)
        while True:
            try:
                answer = self._attempt(method, request, attempts.remaining_s(), request_id)
            except AttnserveError as error:
                wait_s = attempts.wait_after(error)
                if wait_s is None:
                    raise
            else:
                attempts.succeeded()
                return answer
            self._sleep(wait_s)

    def _attempt(
        self, method: grpc.UnaryUnaryMultiCallable[_Q, _A], request: _Q, timeout: float | None, request_id: str = ""
    ) -> _A:
        if self._closed:
            raise closed()
        try:
            return method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, request_id) from error
        except ValueError:
            if self._closed:  # by another thread, between the look above and the call
                raise closed() from None
            raise

    def _answers(self, feed: Feed, exchange: Exchange, ordering: Ordering) -> Iterator[StreamAnswer]:
        if self._closed:
            raise closed()
        call = self._stub.StreamInfer(feed, metadata=self._metadata)
        watch = Watch(exchange, call.cancel)
        try:
            exchange.reading()
            for message in call:
                for answer in exchange.take(message):
                    for ready in ordering.add(answer):
                        yield ready
                        feed.answered()
                exchange.reading()
            exchange.check_done()
            if feed.error is not None:
                raise feed.error
        except grpc.RpcError as error:
            raise (exchange.stalled() if watch.stalled else from_rpc_error(error)) from error
        finally:
            watch.stop()
            feed.close()
            call.cancel()
