"""The fake server: gRPC service, programmable failures and delays, and a record of all requests."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent import futures
from types import TracebackType
from typing import Any, Final, NoReturn, Self

import grpc
from attnserve.v1 import attention_pb2, inference_service_pb2_grpc, labels_pb2
from attnserve.v1 import inference_service_pb2 as wire
from grpc_status import rpc_status

from attnserve_client._selection import AttentionSelection
from attnserve_client._tensors import to_tensor
from attnserve_client.errors import AttnserveError, InvalidRequest, ModelFailed, ModelNotFound, NotServing, Overloaded
from attnserve_client.testing._answers import Shape, attention_of, chosen_layers, outputs_of, tokenize
from attnserve_client.testing._checks import check_queries, check_reference, check_request
from attnserve_client.testing._gateways import GatewayMethods, load_of
from attnserve_client.testing._labels import labels_of
from attnserve_client.testing._refusals import status_of

_THREADS: Final = 64
"""Most threads, created on demand; the health watch of each connection occupies one."""
_SERVING: Final = b"\x08\x01"
"""Encoded `grpc.health.v1.HealthCheckResponse(status=SERVING)`; its package is no dependency of the client."""


class FakeServer:
    """A server on a free loopback port with one fake model. Use it as a context manager.

    The same text always gives the same embedding and attention, and rows of attention sum to 1. Words of more than six
    characters become several tokens, so that tokens and words differ.

    Args:
        model: Name of the model; its version is `1`.
        dimensions: Length of the `embedding` output and of each row of `last_hidden_state`.
        layers: Number of attention sites; with 0, requests for attention fail with `AttentionUnavailable`.
        heads: Heads of each site.
        max_length: Longest sequence in tokens.
        chunk_bytes: Size of the pieces into which larger responses on a stream are split; 0 for no limit.
        window: Tokens before and after it to which each token attends; all sites are then windowed, and their maps are
            bands. None for dense sites.
        labels: Labels of a head that classifies texts; empty for a model without a head.
    """

    def __init__(
        self,
        *,
        model: str = "fake",
        dimensions: int = 16,
        layers: int = 2,
        heads: int = 4,
        max_length: int = 256,
        chunk_bytes: int = 0,
        window: int | None = None,
        labels: tuple[str, ...] = (),
    ) -> None:
        self.model = model
        self.latency_s = 0.0
        """Seconds that each request takes. May be set at any time."""
        self.state = "ready"
        """State of the model: `ready`, `loading`, `draining` or `failed`. Requests fail unless it is `ready`."""
        self.requests: list[wire.InferRequest] = []
        """All inference requests in order of arrival, failed ones included."""
        self.load = load_of(model)
        """The load that `GetLoad` answers with. May be set at any time."""
        self.tokenizer_file = b""
        """The file that `GetTokenizer` answers with, of less than 4 MiB. May be set at any time; empty: it refuses."""
        self.metadata: list[dict[str, Any]] = []
        """The metadata of all calls in order of arrival."""
        self.shape = Shape(dimensions, layers, heads, max_length, window, tuple(labels))
        self.chunk_bytes = chunk_bytes
        self._failures: deque[AttnserveError] = deque()  # taken by the server's threads, single operations only
        self._stopping = threading.Event()
        self._arrived = threading.Condition()
        # The client pings more often than gRPC's servers permit by default.
        options = [("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000)]
        self._server = grpc.server(futures.ThreadPoolExecutor(_THREADS), options=options)
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(_Servicer(self), self._server)
        self._server.add_generic_rpc_handlers((self._health(),))
        self._port = self._server.add_insecure_port("127.0.0.1:0")

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def target(self) -> str:
        """The address for `Client` and `AsyncClient`."""
        return f"127.0.0.1:{self._port}"

    def stop(self) -> None:
        """Stop at once, so that running calls fail. Leaving the context does the same."""
        self._stopping.set()
        self._server.stop(None).wait()

    def wait_for_requests(self, count: int, timeout_s: float = 10.0) -> None:
        """Wait until `count` requests have arrived in total.

        Raises:
            TimeoutError: Fewer arrived within `timeout_s` seconds.
        """
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self.requests) >= count, timeout_s):
                raise TimeoutError(f"{len(self.requests)} of {count} requests arrived within {timeout_s} s")

    def fail_next(self, error: AttnserveError, times: int = 1) -> None:
        """Fail the next `times` requests with the error that the client is to raise."""
        self._failures.extend([error] * times)

    @staticmethod
    def overloaded(retry_delay_s: float | None = 0.0) -> Overloaded:
        """Return a refusal that the client may retry after `retry_delay_s` seconds."""
        return Overloaded(
            "overloaded (queue_full): 64 exceeds 64",
            code="RESOURCE_EXHAUSTED",
            reason="OVERLOADED",
            metadata={"cause": "queue_full", "limit": "64", "value": "64"},
            retry_delay_s=retry_delay_s,
        )

    def not_serving(self, state: str = "draining", retry_delay_s: float | None = 0.0) -> NotServing:
        """Return a refusal of a model in a state other than `ready`, to retry after `retry_delay_s` seconds."""
        return NotServing(
            f"model {self.model!r} is {state}",
            code="UNAVAILABLE",
            reason="NOT_SERVING",
            metadata={"model": self.model, "state": state},
            retry_delay_s=retry_delay_s,
        )

    def answer(self, request: wire.InferRequest) -> wire.InferResponse:
        """Return the response to a request.

        Raises:
            AttnserveError: The request is refused.
        """
        with self._arrived:
            self.requests.append(request)
            self._arrived.notify_all()
        if self.latency_s:
            self._stopping.wait(self.latency_s)
        if self._failures:
            raise self._failures.popleft()
        check_reference(request)
        self.check_model(request.model, request.version)
        if self.state == "failed":
            raise ModelFailed(
                f"model {self.model!r}, version '1', could not be loaded: its state was set",
                code="FAILED_PRECONDITION",
                reason="MODEL_FAILED",
                metadata={"model": self.model, "version": "1", "why": "its state was set"},
            )
        if self.state != "ready":
            raise self.not_serving(self.state)
        return self._respond(request)

    def next_id(self) -> str:
        """Return an id for a request that has none, as a server gives it one."""
        return f"fake-{len(self.requests)}"

    def check_model(self, model: str, version: str) -> None:
        """Check the name and version of a requested model.

        Raises:
            ModelNotFound: The server has no such model.
        """
        if model != self.model or version not in ("", "1"):
            raise ModelNotFound(
                f"no model {model!r}" + (f" of version {version!r}" if version else ""),
                code="NOT_FOUND",
                reason="MODEL_NOT_FOUND",
                metadata={"model": model, "version": version},
            )

    def _respond(self, request: wire.InferRequest) -> wire.InferResponse:
        check_request(request, self.shape)
        names = list(request.outputs.names) if request.HasField("outputs") else list(self.shape.outputs)
        labelled = request.HasField("labels") or not request.HasField("outputs")
        labels = request.labels if self.shape.labels and labelled else None
        selection = AttentionSelection.from_wire(request.attention) if request.HasField("attention") else None
        response = wire.InferResponse(
            receipt=wire.Receipt(
                request_id=request.request_id or self.next_id(),
                model=self.model,
                version="1",
                digest=self.shape.describe(self.model, self.state).digest,
                execution_provider="FakeExecutionProvider",
                precision="fp32",
                timings=None if request.validate_only else wire.Timings(compute_seconds=0.001),
            ),
            effective_attention=None if selection is None else self._effective(selection),
        )
        for position, sequence in enumerate(request.sequences):
            response.results.append(self._result(position, sequence, names, selection, labels, len(request.sequences)))
        response.predicted_bytes = sum(_tensor_bytes(each) for each in response.results)
        if request.validate_only:
            del response.results[:]
        return response

    def _result(
        self,
        position: int,
        sequence: wire.Sequence,
        names: list[str],
        selection: AttentionSelection | None,
        labels: labels_pb2.LabelSelection | None,
        batch: int,
    ) -> wire.SequenceResult:
        units = tokenize(sequence, f"sequences[{position}]")
        if len(units) > (most := self.shape.max_length):
            raise InvalidRequest.of(f"sequences[{position}].text.text", f"{len(units)} tokens exceed {most}")

        def check(length: int) -> None:
            if selection is not None:
                check_queries(selection.to_wire().queries, length, selection.unit or "token", position)

        arrays = outputs_of(units, self.shape)
        return wire.SequenceResult(
            outputs=[to_tensor(name, arrays[name]) for name in names],
            attention=None if selection is None else attention_of(units, selection, self.shape, check),
            labels=None if labels is None else labels_of(arrays["logits"], labels, self.shape.labels),
            run=wire.Run(batch_size=batch, useful_tokens=len(units), computed_tokens=len(units), compute_seconds=0.001),
        )

    def _health(self) -> grpc.GenericRpcHandler:
        """Return the health service, which the client's channels watch by default."""

        def watch(request: bytes, context: Any) -> Iterator[bytes]:  # noqa: ARG001 - gRPC's shape
            ended = threading.Event()
            if context.add_callback(ended.set):
                yield _SERVING
                ended.wait()

        handlers: Any = {"Watch": grpc.unary_stream_rpc_method_handler(watch)}
        return grpc.method_handlers_generic_handler("grpc.health.v1.Health", handlers)

    def _effective(self, selection: AttentionSelection) -> attention_pb2.AttentionSelection:
        layers = chosen_layers(selection, self.shape)
        rollout = selection.layer_reduction == "rollout"
        return AttentionSelection(
            sites=[f"layer.{layer}" for layer in layers],
            layers=layers,
            heads=[head % self.shape.heads for head in selection.to_wire().heads],
            head_reduction=selection.head_reduction or ("mean" if rollout else "each"),
            layer_reduction=selection.layer_reduction or "each",
            queries=selection.queries,
            unit=selection.unit or "token",
            special_tokens=selection.special_tokens or "keep",
            top_k=selection.top_k,
            min_weight=selection.min_weight,
            dtype=selection.dtype or "float32",
            features=selection.features,
            values=selection.values or "weights",
        ).to_wire()


class _Servicer(GatewayMethods):
    """The gRPC service: passes requests to the fake server, and sends its errors as statuses."""

    def __init__(self, server: FakeServer) -> None:
        self._server = self._fake = server

    def Infer(self, request: wire.InferRequest, context: Any) -> wire.InferResponse:  # noqa: N802 - the contract's name
        self._note(context)
        try:
            return self._server.answer(request)
        except AttnserveError as error:
            _abort(context, error, request.request_id or self._server.next_id())

    def StreamInfer(  # noqa: N802 - the contract's name
        self, request_iterator: Iterator[wire.StreamInferRequest], context: Any
    ) -> Iterator[wire.StreamInferResponse]:
        self._note(context)
        for message in request_iterator:
            if message.WhichOneof("message") != "request":
                continue
            request_id = message.request.request_id
            try:
                response = self._server.answer(message.request)
            except AttnserveError as error:
                status = status_of(error, request_id or self._server.next_id()).SerializeToString()
                yield wire.StreamInferResponse(request_id=request_id, status=status)
            else:
                yield from self._pieces(request_id, response)

    def ListModels(  # noqa: N802 - the contract's name
        self,
        request: wire.ListModelsRequest,  # noqa: ARG002 - it is empty
        context: Any,
    ) -> wire.ListModelsResponse:
        self._note(context)
        return wire.ListModelsResponse(models=[self._server.shape.describe(self._server.model, self._server.state)])

    def GetModel(  # noqa: N802 - the contract's name
        self, request: wire.GetModelRequest, context: Any
    ) -> wire.GetModelResponse:
        self._note(context)
        try:
            self._server.check_model(request.model, request.version)
        except AttnserveError as error:
            _abort(context, error, self._server.next_id())
        return wire.GetModelResponse(model=self._server.shape.describe(self._server.model, self._server.state))

    def _pieces(self, request_id: str, response: wire.InferResponse) -> Iterator[wire.StreamInferResponse]:
        size = self._server.chunk_bytes
        data = response.SerializeToString()
        if not size or len(data) <= size:
            yield wire.StreamInferResponse(request_id=request_id, response=response)
            return
        count = -(-len(data) // size)
        for index in range(count):
            chunk = wire.ResponseChunk(index=index, count=count, data=data[index * size : (index + 1) * size])
            yield wire.StreamInferResponse(request_id=request_id, chunk=chunk)

    def _note(self, context: Any) -> None:
        self._server.metadata.append(dict(context.invocation_metadata()))


def _tensor_bytes(result: wire.SequenceResult) -> int:
    total = sum(len(tensor.data) for tensor in result.outputs)
    for each in result.attention.maps:
        links = each.links
        tensors = (each.weights, each.features, links.row_offsets, links.keys, links.weights, links.residual)
        total += sum(len(tensor.data) for tensor in tensors)
    return total


def _abort(context: Any, error: AttnserveError, request_id: str) -> NoReturn:
    context.abort_with_status(rpc_status.to_status(status_of(error, request_id)))
    raise AssertionError("abort_with_status raises")
