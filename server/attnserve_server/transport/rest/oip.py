"""The Open Inference Protocol over HTTP: the methods that `oip.servicer` serves over gRPC, as paths below `/v2`.

Source: the Open Inference Protocol, version 2, HTTP/REST, with Triton's extensions for binary tensor data, statistics,
configuration and the repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from attnserve.oip import open_inference_pb2
from msgspec import UNSET
from starlette.responses import Response

from attnserve_server.access.guard import CALLER
from attnserve_server.domain.errors import NotServing
from attnserve_server.scheduling.queue import Request
from attnserve_server.transport.oip import calls, describe, repository
from attnserve_server.transport.oip.answer import Output
from attnserve_server.transport.oip.layout import TIMINGS
from attnserve_server.transport.oip.wanted import SIZE
from attnserve_server.transport.rest.bodies import EXPANSION, check_json, parsed
from attnserve_server.transport.rest.contract import checked, struct_of, values_of, whole_of
from attnserve_server.transport.rest.errors import REQUEST_ID
from attnserve_server.transport.rest.exchange import ANSWER_EXPANSION, Endpoint, Exchange, decoder_of
from attnserve_server.transport.rest.native import json_of
from attnserve_server.transport.rest.oip_bodies import JSON_BYTES, Sent, json_bytes, read
from attnserve_server.transport.rest.oip_types import (
    ChangeBody,
    Changed,
    Entry,
    IndexBody,
    InferAnswer,
    InferBody,
    InferOutput,
    Live,
    ModelReady,
    Ready,
)
from attnserve_server.transport.timings import Clocked
from attnserve_server.transport.validation import check_request_id
from attnserve_server.transport.wire import as_sent

OCTETS: Final = "application/octet-stream"

MAX_TIMEOUT_S: Final = 1e8
"""A longer timeout of a request is as good as none, and clients send 2^63 microseconds for that."""


async def live(exchange: Exchange) -> Response:
    """Return that the process answers."""
    del exchange
    return json_of(Live(live=True))


async def ready(exchange: Exchange) -> Response:
    """Return that the server as a whole is ready. Raises NotServing."""
    if not exchange.rest.health.serving():
        raise NotServing("", "not ready")
    return json_of(Ready(ready=True))


async def server(exchange: Exchange) -> Response:
    """Name the server and its extensions."""
    del exchange
    return json_of(whole_of(describe.server()))


async def model_ready(exchange: Exchange) -> Response:
    """Return that one model is ready. Raises NotServing, ModelFailed and ModelNotFound."""
    served, _ = exchange.rest.plane.described(*_reference(exchange))
    served.serving()
    return json_of(ModelReady(served.name, ready=True))


def _lists_virtual(exchange: Exchange) -> bool:
    name, value = describe.OWN_OUTPUTS
    return exchange.request.headers.get(name) != value


async def metadata(exchange: Exchange) -> Response:
    """Describe the inputs and outputs of a model."""
    return json_of(
        whole_of(describe.metadata(exchange.rest.plane, *_reference(exchange), virtual=_lists_virtual(exchange)))
    )


async def config(exchange: Exchange) -> Response:
    """Describe a model in the form of Triton's configuration."""
    return json_of(
        whole_of(describe.config(exchange.rest.plane, *_reference(exchange), virtual=_lists_virtual(exchange)))
    )


async def stats(exchange: Exchange) -> Response:
    """Return counts and times of requests, of one model or of all."""
    now = exchange.rest.clock.now()
    return json_of(whole_of(describe.statistics(exchange.rest.plane, *_reference(exchange), now)))


async def index(exchange: Exchange) -> Response:
    """List the models."""
    sent = await _optional(exchange, IndexBody)
    return json_of([whole_of(one) for one in describe.index(exchange.rest.plane, ready=sent.ready).models])


async def load(exchange: Exchange) -> Response:
    """Load the highest version of a model."""
    sent = await _optional(exchange, ChangeBody)
    await repository.load(exchange.rest.models, _reference(exchange)[0], sent.parameters or ())
    return json_of(Changed())


async def unload(exchange: Exchange) -> Response:
    """Unload all versions of a model."""
    sent = await _optional(exchange, ChangeBody)
    name, _ = _reference(exchange)
    await repository.unload(exchange.rest.models, exchange.rest.plane, name, sent.parameters or ())
    return json_of(Changed())


async def infer(exchange: Exchange) -> Response:
    """Run the rows of one request."""
    name, version = _reference(exchange)
    headers = exchange.request.headers
    _check_sender(exchange)
    size = json_bytes(headers.get(JSON_BYTES))
    if size is None:
        body = await exchange.body(EXPANSION)
    else:  # the bytes after the JSON are read in place
        body = await exchange.body(1, min(size, exchange.rest.bodies.limit) * (EXPANSION - 1))
    sent = read(body, size, name, version)
    if sent.id:
        check_request_id(sent.id)
        if REQUEST_ID not in headers:
            exchange.request_id = sent.id
    wanted = sent.wanted
    timeout_s = wanted.parameters.timeout_s
    due = exchange.deadline_s(None if timeout_s is None else min(timeout_s, MAX_TIMEOUT_S))

    def encode(model: str, version: str, outputs: list[Output], timings: Clocked) -> Response:
        return _written(sent, model, version, outputs, timings)

    async def work(request: Request) -> Response:
        plane = exchange.rest.plane
        call = await calls.prepare(plane, request, CALLER.get(), wanted, name, version, exchange.path)
        in_json = any(not wanted.is_binary(output) for output in call.read.names)
        exchange.hold(call.prepared, call.bytes * (ANSWER_EXPANSION if in_json else 1))
        return await call.run(encode)

    return await exchange.while_connected(exchange.run(wanted.size, due, work))


def _written(sent: Sent, model: str, version: str, outputs: Sequence[Output], timings: Clocked) -> Response:
    """Return the answer to a request. `timings`: called once its outputs are written."""
    listed: list[InferOutput] = []
    after: list[Any] = []
    for output in outputs:
        entry = InferOutput(output.name, output.datatype, list(output.shape))
        listed.append(entry)
        if sent.wanted.is_binary(output.name):
            entry.parameters = {SIZE: sum(part.nbytes for part in output.parts)}
            after += map(as_sent, output.parts)
        else:
            entry.data = [value for part in output.parts for value in values_of(part)]
    encoded: Any = msgspec.Raw(msgspec.json.encode(listed))
    spent = {name: max(round(seconds * 1e9), 0) for name, seconds in zip(TIMINGS, timings(), strict=True)}
    answer = InferAnswer(model, version, encoded, sent.id or UNSET, spent)
    head = msgspec.json.encode(answer)
    if not after:
        return Response(head, media_type="application/json")
    return Response(b"".join([head, *after]), headers={JSON_BYTES: str(len(head))}, media_type=OCTETS)


def _reference(exchange: Exchange) -> tuple[str, str]:
    """Return the name and the version in the path; empty where it has none."""
    given = exchange.request.path_params
    return checked(given.get("name", ""), "model"), checked(given.get("version", ""), "version")


def _check_sender(exchange: Exchange) -> None:
    """Raise UnsupportedMediaType for a page of a browser that could be of another origin.

    Clients of the protocol send JSON without a content type, or as another one. A page may do so without permission
    too, but it cannot hide its origin. It needs permission to send `application/json`, or the header of binary data.
    """
    headers = exchange.request.headers
    if ("origin" in headers or "sec-fetch-site" in headers) and JSON_BYTES not in headers:
        check_json(headers.get("content-type", ""))


async def _optional(exchange: Exchange, kind: Any) -> Any:
    """Receive a body of JSON that may be left out."""
    _check_sender(exchange)
    body = await exchange.body(EXPANSION)
    return parsed(body, decoder_of(kind)) if body.strip() else kind()


def _type(message: Any) -> Any:
    return struct_of(message.DESCRIPTOR, whole=True)


def endpoints() -> tuple[Endpoint, ...]:
    """Return the endpoints, in the order in which paths are compared."""
    model = "/v2/models/{name}"
    versioned = f"{model}/versions/{{version}}"
    oip = open_inference_pb2
    example = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["The buyer pays."]}]}
    run: dict[str, Any] = {
        "accepts": InferBody, "returns": InferAnswer, "media_types": (OCTETS,), "example": example
    }  # fmt: skip
    found = [
        Endpoint("GET", "/v2/health/live", live, "Whether the process answers.", returns=Live),
        Endpoint("GET", "/v2/health/ready", ready, "Whether the server is ready.", returns=Ready),
        Endpoint("GET", "/v2", server, "Name the server.", returns=_type(oip.ServerMetadataResponse)),
        Endpoint("GET", "/v2/models/stats", stats, "Statistics of all.", returns=_type(oip.ModelStatisticsResponse)),
        Endpoint("POST", "/v2/repository/index", index, "List the models.", accepts=IndexBody, returns=list[Entry]),
    ]
    for handle, name, summary in ((load, "load", "Load a model."), (unload, "unload", "Unload a model.")):
        path = f"/v2/repository/models/{{name}}/{name}"
        found.append(Endpoint("POST", path, handle, summary, accepts=ChangeBody, returns=Changed))
    for place, of in ((model, "a model"), (versioned, "one version")):
        found += [
            Endpoint("POST", f"{place}/infer", infer, f"Run the rows of a batch: {of}.", **run),
            Endpoint("GET", place, metadata, f"Describe {of}.", returns=_type(oip.ModelMetadataResponse)),
            Endpoint("GET", f"{place}/ready", model_ready, f"Whether {of} is ready.", returns=ModelReady),
            Endpoint("GET", f"{place}/config", config, f"Configuration of {of}.", returns=_type(oip.ModelConfig)),
            Endpoint(
                "GET", f"{place}/stats", stats, f"Statistics of {of}.", returns=_type(oip.ModelStatisticsResponse)
            ),
        ]
    return tuple(found)
