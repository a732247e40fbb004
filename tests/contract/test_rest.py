"""The REST port as such: bodies, request ids, errors, credentials of browsers, disconnects and bounds.

A test endpoint that runs `tiny` by text represents all adapters. Needs the fixtures of tests/contract/conftest.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
from attnserve.v1 import inference_service_pb2 as pb
from attnserve_server.app import Application
from attnserve_server.config import Settings
from attnserve_server.domain import errors
from attnserve_server.observability.spec import HTTP_REQUESTS
from attnserve_server.transport import http
from attnserve_server.transport.rest import bodies, server
from attnserve_server.transport.rest.exchange import Endpoint, Exchange
from attnserve_server.transport.wire import Received
from gated import Gate
from http_calls import call, head
from starlette.responses import Response

PATH = "/v1/embeddings"


class Body(msgspec.Struct):
    text: str
    timeout: float | None = None
    fail: str = ""


async def run(exchange: Exchange) -> Response:
    sent = await exchange.json(Body)
    if sent.fail:
        raise FAILURES[sent.fail]
    exchange.admit(1)
    message = pb.InferRequest(model="tiny", version="2", sequences=[pb.Sequence(text=pb.TextInput(text=sent.text))])
    due = exchange.deadline_s(sent.timeout)
    answer = await exchange.while_connected(exchange.infer(Received(message, message.ByteSize()), due))
    return Response(msgspec.json.encode(answer.results[0].outputs[1].shape[0]), media_type="application/json")


FAILURES: dict[str, Exception] = {
    "overloaded": errors.Overloaded("queue_full", 1, 2, 1.5),
    "too_large": errors.ResponseTooLarge(2, 1),
    "not_serving": errors.NotServing("tiny", "loading"),
    "unsupported": errors.Unsupported("no", "try"),
    "expired": errors.DeadlineExpired(1.0),
    "crashed": errors.EngineCrashed("tiny"),
    "unknown": RuntimeError("/etc/passwd"),
}
STATUS = {
    "overloaded": 429, "too_large": 413, "not_serving": 503, "unsupported": 501, "expired": 504, "crashed": 500,
    "unknown": 500,
}  # fmt: skip


@pytest.fixture(autouse=True)
def endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = (PATH, "/rerank", "/v2/rerank", "/v1/models/{name}:infer")
    monkeypatch.setattr(server, "endpoints", lambda: tuple(Endpoint("POST", path, run, "Test.") for path in paths))


@pytest.fixture
async def allowing(settings: Settings) -> AsyncIterator[Application]:
    """A server that serves pages of one origin."""
    application = Application(settings.model_copy(update={"cors_origin": ("https://a.example",)}))
    await application.start()
    yield application
    await application.aclose()


def counted(application: Application, status: int) -> float:
    return application.metrics.counter(HTTP_REQUESTS).labels(PATH, str(status)).value


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - of a server, which sets no event
            await asyncio.sleep(0.01)


async def test_a_request_is_answered_and_counted(server: Application) -> None:
    answer = await call(server.rest_port, "POST", PATH, {"text": "the cat"}, {"x-request-id": "mine 1"})
    assert (answer.status, answer.json, answer.headers["x-request-id"]) == (200, 8, "mine 1")
    other = await call(server.rest_port, "POST", PATH, {"text": "the cat"})
    assert other.headers["x-request-id"]
    assert counted(server, 200) == 2


@pytest.mark.parametrize("fail", FAILURES)
@pytest.mark.parametrize("path", [PATH, "/rerank", "/v2/rerank", "/v1/models/tiny:infer"])
async def test_every_error_has_the_form_of_its_path(server: Application, path: str, fail: str) -> None:
    answer = await call(server.rest_port, "POST", path, {"text": "a", "fail": fail}, {"x-request-id": "n7"})
    assert answer.status == STATUS[fail]
    assert ("retry-after" in answer.headers) is (answer.status in {429, 503})
    assert b"passwd" not in answer.body
    content = answer.json
    if path == PATH:
        assert content.keys() == {"error"}
        assert content["error"].keys() >= {"message", "type", "code"}
        content = content["error"]
    elif path.endswith("rerank"):
        assert isinstance(content["error"], str)
        assert content["message"] == content["error"]
    else:
        assert answer.headers["content-type"] == "application/problem+json"
        assert content["status"] == answer.status
    assert content["request_id"] == "n7"
    assert content["reason"] == getattr(FAILURES[fail], "reason", "INTERNAL")


@pytest.mark.parametrize(
    ("body", "headers", "status", "said"),
    [
        (b"{", {}, 400, "no JSON"),
        (b'{"text": 3}', {}, 400, "text"),
        (b"[" * 5000, {}, 400, "Expected"),
        (b'{"text": "a", "x": ' + b"[" * 5000, {}, 400, "deep"),
        (b'{"text": "a", "x": [' + b"[]," * 40_000 + b"1]}", {}, 400, "exceed"),
        (b'{"text": "\xff"}', {}, 400, "no JSON"),
        (b'{"text": "a"}', {"content-type": "text/plain"}, 415, "application/json"),
        (b'{"text": "a"}', {"content-type": ""}, 415, "application/json"),
        (b'{"text": "a"}', {"content-encoding": "gzip"}, 415, "compressed"),
        (b'{"text": "a"}', {"content-length": str(2**40)}, 413, "exceed"),
        (b'{"text": "a"}', {"x-request-id": "a" * 129}, 400, "x-request-id"),
        (b'{"text": "a", "timeout": 0}', {}, 400, "timeout"),
        (b'{"text": ""}', {}, 400, "text"),
    ],
)
async def test_bad_requests_are_refused_by_name(
    server: Application, body: bytes, headers: dict[str, str], status: int, said: str
) -> None:
    answer = await call(server.rest_port, "POST", PATH, body, headers)
    assert answer.status == status
    assert said in answer.json["error"]["message"]


async def test_braces_within_texts_are_no_structure(server: Application) -> None:
    answer = await call(server.rest_port, "POST", PATH, {"text": "the cat", "other": '"{' * 40_000})
    assert answer.status == 200


async def test_unknown_paths_and_methods_are_refused_in_their_forms(server: Application) -> None:
    missing = await call(server.rest_port, "GET", "/nothing")
    assert (missing.status, missing.json["reason"]) == (404, "PATH_NOT_FOUND")
    assert (await call(server.rest_port, "GET", "/v2/nothing")).json.keys() == {"error", "reason", "request_id"}
    wrong = await call(server.rest_port, "GET", PATH)
    assert (wrong.status, wrong.headers["allow"], wrong.json["error"]["code"]) == (405, "POST", "METHOD_NOT_ALLOWED")
    assert (await call(server.rest_port, "GET", "/metrics")).status == 404


async def test_only_pages_of_named_origins_may_call(server: Application, allowing: Application) -> None:
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert (await call(server.rest_port, "OPTIONS", PATH, headers=asked)).status == 405
    allowed = await call(allowing.rest_port, "OPTIONS", PATH, headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    other = await call(allowing.rest_port, "OPTIONS", PATH, headers=asked | {"origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers
    answer = await call(allowing.rest_port, "POST", PATH, {"text": "cat"}, {"origin": "https://a.example"})
    assert answer.headers["access-control-allow-origin"] == "https://a.example"


async def test_the_timeout_of_a_request_is_its_deadline(server: Application, gate: Gate) -> None:
    answer = await call(server.rest_port, "POST", PATH, {"text": "cat", "timeout": 0.2})
    assert (answer.status, answer.json["error"]["code"]) == (504, "DEADLINE_EXPIRED")


async def test_a_client_that_leaves_cancels_its_request(server: Application, gate: Gate) -> None:
    body = json.dumps({"text": "the cat"}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.rest_port)
    del reader
    fields = {"host": "a", "content-type": "application/json", "content-length": str(len(body))}
    writer.write(head("POST", PATH, fields) + body)
    await until(lambda: bool(gate.waiting))
    writer.transport.abort()
    await until(lambda: all(one.ended for one in gate.waiting))
    await until(lambda: bool(counted(server, 499)))


async def test_a_body_that_does_not_arrive_ends(server: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "ARRIVES_S", 0.2)
    answer = await call(server.rest_port, "POST", PATH, b'{"text"', {"content-length": "50"})
    assert (answer.status, answer.json["error"]["code"]) == (408, "BODY_NOT_RECEIVED")


async def test_bodies_share_a_budget(server: Application) -> None:
    held = server.rest._rest.bodies
    held.take(held._budget)
    refused = await call(server.rest_port, "POST", PATH, {"text": "cat"})
    assert (refused.status, refused.json["error"]["code"], refused.headers["retry-after"]) == (429, "OVERLOADED", "1")
    held.give(held._budget)
    assert (await call(server.rest_port, "POST", PATH, {"text": "cat"})).status == 200
    assert held._taken == 0


async def test_a_slow_head_ends_its_connection(server: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEAD_S", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.rest_port)
    writer.write(b"POST /rerank HTTP/1.1\r\n")
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()


async def test_equal_numbers_merge_both_ports(settings: Settings) -> None:
    first = Application(settings)
    await first.start()
    port = first.rest_port
    await first.aclose()
    merged = Application(settings.model_copy(update={"rest_port": port, "http_port": port}))
    await merged.start()
    try:
        assert (merged.rest_port, merged.http_port) == (port, port)
        assert (await call(port, "GET", "/readyz")).json["status"] == "ready"
        assert b"attnserve_requests_total" in (await call(port, "GET", "/metrics")).body
        assert (await call(port, "POST", PATH, {"text": "cat"})).status == 200
    finally:
        await merged.aclose()
