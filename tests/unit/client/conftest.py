"""Fixtures for the client's tests: a fake server, and one driver for both clients.

A test that takes `driver` or `driver_class` runs twice: with `Client` and with `AsyncClient`. `raw_server` is a class:
the test passes it the methods of a gRPC server, for answers that `FakeServer` never gives. All servers listen on
loopback, on a port that the system chose.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from attnserve.v1 import inference_service_pb2_grpc
from attnserve_client import AsyncClient, Client, RetryPolicy, StreamAnswer
from attnserve_client.testing import FakeServer
from grpc_health.v1 import health, health_pb2, health_pb2_grpc


class SyncDriver:
    """Drives `Client` from an event loop, so that one test serves both clients."""

    def __init__(self, target: Any, **arguments: Any) -> None:
        self.client = Client(target, **arguments)
        self.waits: list[float] = []
        self.client._calls._sleep = self.waits.append

    async def infer(self, *arguments: Any, **options: Any) -> Any:
        return await asyncio.to_thread(self.client.infer, *arguments, **options)

    async def stream(self, model: str, inputs: Any, **options: Any) -> list[StreamAnswer]:
        return await asyncio.to_thread(lambda: list(self.client.stream(model, inputs, **options)))

    async def first(self, model: str, inputs: Any, **options: Any) -> StreamAnswer:
        """The first answer of a stream, which is then closed."""

        def read() -> StreamAnswer:
            answers = self.client.stream(model, inputs, **options)
            first = next(answers)
            answers.close()  # type: ignore[attr-defined] # a generator
            return first

        return await asyncio.to_thread(read)

    async def models(self, **options: Any) -> Any:
        return await asyncio.to_thread(self.client.models, **options)

    async def model(self, *arguments: Any, **options: Any) -> Any:
        return await asyncio.to_thread(self.client.model, *arguments, **options)

    async def ready(self, *arguments: Any, **options: Any) -> bool:
        return await asyncio.to_thread(self.client.ready, *arguments, **options)

    async def close(self) -> None:
        with self.client:
            pass


class AsyncDriver:
    """Drives `AsyncClient` with the same methods."""

    def __init__(self, target: Any, **arguments: Any) -> None:
        self.client = AsyncClient(target, **arguments)
        self.waits: list[float] = []
        self.client._calls._sleep = self._record

        self.infer = self.client.infer
        self.models = self.client.models
        self.model = self.client.model
        self.ready = self.client.ready

    async def _record(self, wait_s: float) -> None:
        self.waits.append(wait_s)

    async def stream(self, model: str, inputs: Any, **options: Any) -> list[StreamAnswer]:
        return [answer async for answer in self.client.stream(model, inputs, **options)]

    async def first(self, model: str, inputs: Any, **options: Any) -> StreamAnswer:
        answers = self.client.stream(model, inputs, **options)
        first = await anext(answers)
        await answers.aclose()  # type: ignore[attr-defined] # a generator
        return first

    async def close(self) -> None:
        async with self.client:
            pass


class RawServer:
    """A server whose `Infer`, `GetModel` and `StreamInfer` are functions of the test."""

    def __init__(self, **methods: Callable[..., Any]) -> None:
        servicer = type("Servicer", (inference_service_pb2_grpc.InferenceServiceServicer,), {})()
        for name, method in methods.items():
            setattr(servicer, name, method)
        self.server = grpc.server(futures.ThreadPoolExecutor(8))
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, self.server)
        self.health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        self.health.set("", health_pb2.HealthCheckResponse.SERVING)
        self.target = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> RawServer:
        self.server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop(None).wait()


@pytest.fixture
def raw_server() -> type[RawServer]:
    """The class, for a test to call with the methods of its server."""
    return RawServer


@pytest.fixture(scope="session")
def shared_server() -> Iterator[FakeServer]:
    """A server for tests that only send requests."""
    with FakeServer() as server:
        yield server


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A separate server, for tests that change or stop it."""
    with FakeServer(chunk_bytes=400) as server:
        yield server


@pytest.fixture(params=[SyncDriver, AsyncDriver], ids=["sync", "async"])
def driver_class(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
async def driver(driver_class: Any, server: FakeServer) -> AsyncIterator[Any]:
    """A client of either kind at `server`, which records its waits instead of waiting."""
    made = driver_class(server.target)
    yield made
    await made.close()


@pytest.fixture
async def patient_driver(driver_class: Any, server: FakeServer) -> AsyncIterator[Any]:
    """The same with an unlimited retry budget: the control for tests of the budget."""
    made = driver_class(server.target, retry=RetryPolicy(budget_tokens=1e9))
    yield made
    await made.close()
