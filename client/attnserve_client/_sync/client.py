# Generated from _async/client.py by client/unasync.py: change that file, then run `make client`.
"""The client for threads: one method for each call, and the loop that reads a stream."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self, overload

import grpc
from attnserve.v1 import inference_service_pb2 as wire

from attnserve_client._channel import DEFAULT_TARGET
from attnserve_client._connection import Connections
from attnserve_client._credentials import Tls, TokenFile
from attnserve_client._exchange import MAX_IN_FLIGHT, Exchange, Flow, Ordering
from attnserve_client._feeds import Feed, InputStream
from attnserve_client._inputs import Input, Inputs, Priority, check_timeout, request_of, sequence_of, split, takes_ids
from attnserve_client._labels import LabelChoice
from attnserve_client._models import ModelInfo
from attnserve_client._results import InferenceResult, StreamAnswer, results_of
from attnserve_client._retry import DEFAULT_TIMEOUT_S, Retrying, RetryPolicy
from attnserve_client._selection import AttentionChoice
from attnserve_client._sync.admin import Admin
from attnserve_client._sync.calls import Calls
from attnserve_client._sync.faithful import Faithful
from attnserve_client._sync.gateways import Gateways
from attnserve_client._sync.helpers import Helpers
from attnserve_client._sync.waiting import Waiting
from attnserve_client.errors import InvalidRequest


class Client(Helpers, Admin, Gateways, Waiting, Faithful):
    """A client for threads. Any number of threads may share it. Use `with`, or call `close`.

        with Client("localhost:8001") as client:
            last_layer = AttentionSelection(layers=[-1], heads="mean")
            result = client.infer("minilm", "a sentence", attention=last_layer)
            print(result.outputs["embedding"], result.attention[0].links())

    `close` cancels the running requests of all threads.

    Args:
        target: `host:port`, any gRPC name, or a list of them, over which calls are distributed. Without a port, 8001.
        credentials: `data_types.Tls`, or gRPC's own credentials; None for an unencrypted connection.
        token: Bearer token, sent with every call, or a `data_types.TokenFile`, which is read again when it changes.
        metadata: Further metadata, sent with every call.
        retry: When requests are sent again; `RetryPolicy(max_attempts=1)` turns retries off.
        connections: Connections to each address, over which calls and streams are spread, from 1 to 512. A server of
            several front processes (`serve --fronts`) needs several: each connection reaches one of them.
        options: gRPC channel options; they override this client's defaults.

    Raises:
        ValueError: `target` is empty, has an empty member or a URL, a member of a list holds several addresses,
            `connections` is out of range, or a file of `credentials` is not PEM.
        OSError: A file of `credentials` cannot be read.
    """

    def __init__(
        self,
        target: str | Sequence[str] = DEFAULT_TARGET,
        *,
        credentials: grpc.ChannelCredentials | Tls | None = None,
        token: str | TokenFile | None = None,
        metadata: Sequence[tuple[str, str | bytes]] = (),
        retry: RetryPolicy | None = None,
        connections: int = 1,
        options: Mapping[str, int | str] | None = None,
    ) -> None:
        self._connections = Connections(target, credentials, token, metadata, options or {}, connections)
        self._calls = Calls(self._connections, Retrying.of(retry or RetryPolicy()))
        # Models by name and version. Each access is one operation on the dict, so threads need no lock.
        self._described: dict[tuple[str, str], ModelInfo] = {}

    def __repr__(self) -> str:
        """Return class and addresses, never the token."""
        return f"{type(self).__name__}({', '.join(self._connections.names)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel all running calls and close the connections. Closing again has no effect."""
        self._connections.close()

    @overload
    def infer(  # type: ignore[overload-overlap] # a list of ids is one input, any other list is several
        self,
        model: str,
        inputs: Input,
        *,
        version: str = ...,
        outputs: Sequence[str] | None = ...,
        attention: AttentionChoice = ...,
        labels: LabelChoice = ...,
        prompt_name: str | None = ...,
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
        attention: AttentionChoice = ...,
        labels: LabelChoice = ...,
        prompt_name: str | None = ...,
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
        attention: AttentionChoice = None,
        labels: LabelChoice = None,
        prompt_name: str | None = None,
        priority: Priority = "normal",
        timeout: float | None = DEFAULT_TIMEOUT_S,
        request_id: str | None = None,
        validate_only: bool = False,
    ) -> InferenceResult | list[InferenceResult]:
        """Run one sequence, or a list of sequences as one request: either all of them succeed, or the call fails.

        Args:
            model: Name of the model.
            inputs: A text, a pair of texts, token ids, arrays by input name without the batch axis, or a
                `Continuation`; or a list.
            version: Version of the model; empty for the highest that is ready.
            outputs: Names of the outputs to return; None for all but those with `on_request`, an empty list for none.
            attention: Selection of the attention to return, or a dict of its fields; True for all of it, None or
                False for none.
            labels: Selection of the labels of the model's head; True for the head's defaults. None for labels if the
                model has a head and `outputs` is None, otherwise for none.
            prompt_name: Name of the prompt to put before texts, as in `ModelInfo.prompts`; None for the model's default
                prompt, empty for none.
            priority: `"low"`, `"normal"` or `"high"`.
            timeout: Seconds until `DeadlineExpired`, all attempts together; None for no limit.
            request_id: Id of this request in results, errors and the server's log; None generates one.
            validate_only: Check the request and predict the size of its response, without running the model.

        Returns:
            A result for one input, a list of results for a list.

        Raises:
            AttnserveError: The call failed; the classes are in `attnserve_client.errors`.
            TypeError: An argument has a type that is no input, selection or list of outputs, or `labels` is False.
        """
        check_timeout(timeout)
        deadline = self._calls.deadline(timeout)
        items, many = split(inputs)
        description = self._description(model, version, deadline) if takes_ids(items) else None
        request_id = request_id or uuid.uuid4().hex
        request = request_of(
            model=model,
            version=version,
            sequences=[sequence_of(each, description) for each in items],
            outputs=outputs,
            attention=attention,
            labels=labels,
            prompt_name=prompt_name,
            priority=priority,
            request_id=request_id,
            validate_only=validate_only,
        )
        try:
            response = self._calls.call(lambda stub: stub.Infer, request, deadline, request_id)
        except InvalidRequest:
            self._described.pop((model, version), None)  # the description may be that of a model since replaced
            raise
        results = results_of(response, len(items), validate_only=validate_only)
        return results if many else results[0]

    def stream(  # noqa: PLR0913 - everything but model and inputs is passed by name
        self,
        model: str,
        inputs: InputStream,
        *,
        version: str = "",
        outputs: Sequence[str] | None = None,
        attention: AttentionChoice = None,
        labels: LabelChoice = None,
        prompt_name: str | None = None,
        priority: Priority = "normal",
        timeout: float | None = DEFAULT_TIMEOUT_S,
        validate_only: bool = False,
        ordered: bool = True,
        max_in_flight: int = MAX_IN_FLIGHT,
        per_message: int = 1,
    ) -> Iterator[StreamAnswer]:
        """Run many sequences over one stream: the cheapest call for many inputs, and the one for very large responses.

        The stream takes the next input when fewer than `max_in_flight` are unanswered. If one input fails, its answer
        holds the error and the stream continues. If the stream breaks, it raises. If `inputs` raises, or yields an
        input that cannot be sent, the stream answers all inputs before it and then raises that error. Nothing is
        sent twice.

        Args:
            model: Name of the model.
            inputs: Any number of texts, pairs of texts, token ids, arrays by input name, or a `Continuation` each.
                A separate thread iterates over them.
            version: Version of the model; empty for the highest that is ready.
            outputs: Names of the outputs to return; None for all but those with `on_request`, an empty list for none.
            attention: Selection of the attention to return, or a dict of its fields; True for all of it, None or
                False for none.
            labels: Selection of the labels of the model's head; True for the head's defaults. None for labels if the
                model has a head and `outputs` is None, otherwise for none.
            prompt_name: Name of the prompt to put before texts, as in `ModelInfo.prompts`; None for the model's default
                prompt, empty for none.
            priority: `"low"`, `"normal"` or `"high"`.
            timeout: Seconds that the answer to each input may take; None for no limit. If no answer at all arrives
                for longer, the stream raises `DeadlineExpired`.
            validate_only: Check the inputs and predict the size of their responses, without running the model.
            ordered: Yield answers in the order of the inputs; False yields them as they arrive.
            max_in_flight: Most inputs that are taken and not yet answered.
            per_message: Inputs in one message, at most the model's `max_batch_size`. Larger messages cost less per
                input, but their inputs wait for each other, and succeed or fail together.

        Yields:
            An answer for each input, with `index`, `request_id`, and `result` or `error`.

        Raises:
            InvalidRequest: `timeout`, `max_in_flight` or `per_message` is out of range; raised by this call itself.
            AttnserveError: The stream broke, or an input cannot be sent.
            TypeError: As for `infer`.
        """
        check_timeout(timeout)

        def sequence(one: Input) -> wire.Sequence:
            deadline = self._calls.deadline(timeout)
            return sequence_of(one, self._description(model, version, deadline) if takes_ids([one]) else None)

        def message(group: list[wire.Sequence]) -> wire.InferRequest:
            return request_of(
                model=model,
                version=version,
                sequences=group,
                outputs=outputs,
                attention=attention,
                labels=labels,
                prompt_name=prompt_name,
                priority=priority,
                request_id="",
                validate_only=validate_only,
            )

        exchange = Exchange(timeout, validate_only=validate_only)
        return self._answers(
            Feed(inputs, sequence, message, exchange, Flow(max_in_flight, per_message)),
            exchange,
            Ordering(ordered=ordered),
            timeout,
        )

    def _answers(
        self, feed: Feed, exchange: Exchange, ordering: Ordering, timeout: float | None
    ) -> Iterator[StreamAnswer]:
        self._calls.reach(timeout)
        with self._connections.stream(feed, exchange) as messages:
            exchange.reading()
            for message in messages:
                for answer in exchange.take(message):
                    for ready in ordering.add(answer):
                        yield ready
                        feed.answered()
                exchange.reading()
            exchange.check_done()
        if feed.error is not None:
            raise feed.error
