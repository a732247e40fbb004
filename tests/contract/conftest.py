"""Fixtures of the contract tests: a repository with the tiny model, and a real server over it on loopback.

The tiny model has two layers of attention over ten words. The server runs in the test's own process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import grpc
import pytest
from attnserve_client import AsyncClient, Client
from attnserve_server.app import Application
from attnserve_server.config import Settings
from callers import Caller
from gated import Gate
from tiny_bundle import write_tiny_files, write_tiny_repository

OPTIONS = [("grpc.max_receive_message_length", 64 * 2**20), ("grpc.max_send_message_length", 128 * 2**20)]


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model's graph and tokenizer, by their names in a bundle."""
    return write_tiny_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_repository(tmp_path_factory: pytest.TempPathFactory, tiny_files: dict[str, Path]) -> Path:
    """The models `tiny`, versions 1 and 2, and `plain`, which takes tensors only."""
    return write_tiny_repository(tmp_path_factory.mktemp("repository"), tiny_files)


@pytest.fixture(params=[Client, AsyncClient], ids=["sync", "async"])
def caller(request: pytest.FixtureRequest) -> Callable[..., Caller]:
    """Makes a client of either kind, from a target and options."""
    return partial(Caller, request.param)


@pytest.fixture
def settings(tiny_repository: Path) -> Settings:
    """Settings of a server over `tiny_repository`, on free ports, with room for four requests of a stream."""
    return Settings(
        repository=tiny_repository, grpc_port=0, http_port=0, instances=2, drain_grace_s=5, max_stream_in_flight=4
    )


@pytest.fixture
async def server(settings: Settings) -> AsyncIterator[Application]:
    """A started server for one test."""
    application = Application(settings)
    await application.start()
    yield application
    await application.aclose()


@pytest.fixture
async def channel(server: Application) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to `server`."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}", options=OPTIONS) as opened:
        yield opened
        # Calls that a test leaves open end with the channel, before the loop closes.
        await asyncio.sleep(0)


@pytest.fixture
def gate(server: Application) -> Gate:
    """The scheduler of `tiny`, version 2, replaced by one that holds each request until the test releases it."""
    model = server.catalog.get("tiny", "2")
    assert model.manifest is not None
    made = Gate(model.manifest)
    model.scheduler = made
    return made
