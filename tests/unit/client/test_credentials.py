"""What a client shows the server: a token file is read again when it changes, and refusals are never retried."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
from attnserve.v1 import inference_service_pb2 as wire
from attnserve_client import AttnserveError, Client, RetryPolicy
from attnserve_client._credentials import per_call
from attnserve_client.bench.sending import connected
from attnserve_client.data_types import Tls, TokenFile
from attnserve_client.errors import PermissionDenied, RequestCancelled, Unauthenticated
from attnserve_client.testing import FakeServer


class Clock:
    time = 0.0

    def __call__(self) -> float:
        return self.time


def swap(path: Path, text: str) -> None:
    partial = path.with_name("new")
    partial.write_text(text)
    partial.replace(path)


def test_a_token_file_is_read_again_a_second_later(tmp_path: Path) -> None:
    path, clock = tmp_path / "token", Clock()
    path.write_text("first\n")
    token = TokenFile(path, clock)
    swap(path, "second")
    assert token.token == "first"
    clock.time = 1.0
    assert token.token == "second"


@pytest.mark.parametrize("broken", ["", "two words", "\xe9"])
def test_the_last_token_is_sent_while_the_file_is_broken_or_missing(tmp_path: Path, broken: str) -> None:
    path, clock = tmp_path / "token", Clock()
    path.write_text("first")
    token = TokenFile(path, clock)
    swap(path, broken)
    clock.time = 1.0
    assert token.token == "first"
    path.unlink()
    clock.time = 2.0
    assert token.token == "first"
    path.write_text("second")
    clock.time = 3.0
    assert token.token == "second"


def test_a_token_file_must_hold_one_word_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(FileNotFoundError):
        TokenFile(path)
    path.write_text("two words")
    with pytest.raises(ValueError, match="token holds 2 words; a token file holds the token alone"):
        TokenFile(path)


def test_metadata_has_the_token_of_the_moment(tmp_path: Path) -> None:
    path, clock = tmp_path / "token", Clock()
    path.write_text("first")
    metadata = per_call(TokenFile(path, clock), (("x", "y"),))
    assert metadata() == (("authorization", "Bearer first"), ("x", "y"))
    swap(path, "second")
    clock.time = 1.0
    assert metadata()[0] == ("authorization", "Bearer second")
    assert per_call(None, ())() == ()


class Changing(TokenFile):
    """A file that has another token each time."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    @property
    def token(self) -> str:
        return f"token-{next(self._numbers)}"


@pytest.mark.parametrize("policy", [RetryPolicy(), RetryPolicy(attempt_timeout_s=20.0)], ids=["plain", "watched"])
async def test_each_attempt_and_each_stream_sends_the_token_of_the_moment(
    driver_class: Any, server: FakeServer, policy: RetryPolicy
) -> None:
    driver = driver_class(server.target, token=Changing(), retry=policy)
    server.fail_next(server.overloaded(retry_delay_s=0.01))
    await driver.infer("fake", "text")
    await driver.stream("fake", ["text"])
    await driver.close()
    assert sent_to(server) == ["Bearer token-0", "Bearer token-1", "Bearer token-2"]


async def test_a_hedge_sends_the_token_of_the_moment(driver_class: Any, server: FakeServer) -> None:
    server.latency_s = 30.0
    driver = driver_class(server.target, token=Changing(), retry=RetryPolicy(hedge_after_s=0.1))
    call = asyncio.create_task(driver.infer("fake", "text"))
    await asyncio.to_thread(server.wait_for_requests, 2)
    await driver.close()
    with pytest.raises(RequestCancelled):
        await call
    assert sorted(sent_to(server)) == ["Bearer token-0", "Bearer token-1"]


async def test_each_call_of_a_load_test_sends_the_token_of_the_moment(server: FakeServer) -> None:
    async with connected(server.target, 1, token=Changing()) as (stub,):
        for _ in range(2):
            await stub.Infer(wire.InferRequest(model="fake", sequences=[wire.Sequence(text={"text": "a"})]))
    assert sent_to(server) == ["Bearer token-0", "Bearer token-1"]


def sent_to(server: FakeServer) -> list[str]:
    return [metadata["authorization"] for metadata in server.metadata if "authorization" in metadata]


def test_tls_needs_both_halves_and_pem_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of cert and key only one is set; set both, or neither"):
        Tls(cert="client.pem")
    with pytest.raises(FileNotFoundError):
        Client("localhost:1", credentials=Tls(ca=tmp_path / "none.pem"))
    (tmp_path / "ca.der").write_bytes(b"\x30\x82")
    with pytest.raises(ValueError, match=r"ca\.der is no PEM file; it must hold a line BEGIN CERTIFICATE"):
        Client("localhost:1", credentials=Tls(ca=tmp_path / "ca.der"))


@pytest.mark.parametrize(
    ("code", "kind"), [("UNAUTHENTICATED", Unauthenticated), ("PERMISSION_DENIED", PermissionDenied)]
)
def test_refusals_are_never_retried(code: str, kind: type[AttnserveError]) -> None:
    facts: dict[str, Any] = {"metadata": {"cause": "unknown", "scope": "attention", "token": "nightly"}}
    with FakeServer() as server, Client(server.target, retry=RetryPolicy(max_attempts=5)) as client:
        server.fail_next(kind("no", code=code, reason=code, **facts), times=5)
        with pytest.raises(kind) as caught:
            client.infer("fake", "a text")
        assert len(server.requests) == 1
        error = caught.value
        if isinstance(error, PermissionDenied):
            assert (error.scope, error.token) == ("attention", "nightly")
        else:
            assert isinstance(error, Unauthenticated)
            assert error.cause == "unknown"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("--token", "a", "--token-file", "b"), "give --token or --token-file, not both"),
        (("--cert", "a"), "give both --cert and --key, or neither"),
        (("--ca", "none.pem"), "No such file"),
        (("--token-file", "none"), "No such file"),
    ],
)
def test_command_refuses_what_it_cannot_show(line: tuple[str, ...], words: str) -> None:
    from attnserve_client.cli._app import app  # noqa: PLC0415 - of the extra cli
    from typer.testing import CliRunner  # noqa: PLC0415 - as above

    refused = CliRunner().invoke(app, [*line, "models"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert refused.exit_code == 2
    assert words in refused.output
