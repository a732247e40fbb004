"""Files are read at the start and again when they change; broken ones change nothing, and a metric reports it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from attnserve_server.access import keeper as module
from attnserve_server.access.certificates import CertificatesInvalid
from attnserve_server.access.guard import Material
from attnserve_server.access.keeper import FileUnusable, Keeper
from attnserve_server.access.limits import Buckets
from attnserve_server.access.tokens import MAX_TOKENS, TokensInvalid
from attnserve_server.config import Settings
from attnserve_server.observability.metrics import Metrics
from attnserve_server.observability.spec import CERTIFICATE_END, RELOADS, STALE
from credentials import Files, Tokens, swap
from structlog.testing import capture_logs


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.01)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def keeper(metrics: Metrics, **settings: Any) -> Keeper:
    return Keeper(Settings(**settings), metrics, Buckets(MAX_TOKENS))


@asynccontextmanager
async def watched(one: Keeper) -> AsyncIterator[list[Material]]:
    changes: list[Material] = []
    task = asyncio.create_task(one.watch(changes.append))
    yield changes
    task.cancel()
    await asyncio.wait((task,))


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0.01)


def tls(files: Files) -> dict[str, Path]:
    return {"tls_cert": files.cert, "tls_key": files.key, "tls_client_ca": files.client_ca}


def reloads(metrics: Metrics) -> dict[tuple[str, ...], float]:
    return {labels: one.value for labels, one in metrics.counter(RELOADS).series.items()}


def test_without_files_nothing_is_checked(metrics: Metrics) -> None:
    assert keeper(metrics).start() == Material(None, None)


def test_files_are_read_and_the_end_of_the_certificate_is_a_metric(metrics: Metrics, tmp_path: Path) -> None:
    files, tokens = Files(tmp_path), Tokens(tmp_path / "tokens.txt")
    tokens.add("a", "infer")
    tokens.add("old", "infer", expires="2020-01-01")
    material = keeper(metrics, **tls(files), tokens_file=tokens.path).start()
    assert material.certificates is not None
    assert material.certificates.client_ca == files.client_ca.read_bytes()
    assert [token.name for token in material.tokens or ()] == ["a"], "an expired token is left out"
    end = metrics.gauge(CERTIFICATE_END).labels().value
    assert end == material.certificates.not_after().timestamp()


@pytest.mark.parametrize(("insecure", "expected"), [(True, ["insecure"]), (False, [])])
def test_insecure_is_a_warning_in_the_log(metrics: Metrics, insecure: bool, expected: list[str]) -> None:
    with capture_logs() as lines:
        keeper(metrics, insecure=insecure).start()
    assert [line["event"] for line in lines] == expected
    assert all(line["log_level"] == "warning" for line in lines)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda files, _: files.cert.unlink(), FileUnusable, "--tls-cert: cannot read tls.pem: No such file"),
        (lambda files, _: files.key.write_text(""), FileUnusable, "--tls-key: tls.key is empty"),
        (lambda files, _: files.key.write_text("x"), CertificatesInvalid, "--tls-key: it holds no PEM private key"),
        (lambda files, _: files.client_ca.write_text("x"), CertificatesInvalid, "--tls-client-ca: it holds no PEM"),
        (lambda _, tokens: tokens.path.unlink(), FileUnusable, "--tokens-file: cannot read tokens.txt"),
        (lambda _, tokens: tokens.path.write_text("x"), TokensInvalid, "--tokens-file tokens.txt: line 1: the second"),
    ],
)
def test_an_unusable_file_fails_the_start_with_its_setting(
    metrics: Metrics, tmp_path: Path, change: Callable[[Files, Tokens], object], error: type[Exception], words: str
) -> None:
    files, tokens = Files(tmp_path), Tokens(tmp_path / "tokens.txt")
    tokens.add("a", "infer")
    change(files, tokens)
    with pytest.raises(error) as caught:
        keeper(metrics, **tls(files), tokens_file=tokens.path).start()
    assert str(caught.value).startswith(words)


async def test_a_changed_file_is_read_again_and_a_broken_one_is_not_used(metrics: Metrics, tmp_path: Path) -> None:
    tokens = Tokens(tmp_path / "tokens.txt")
    tokens.add("a", "infer")
    one = keeper(metrics, tokens_file=tokens.path)
    one.start()
    async with watched(one) as changes:
        await asyncio.sleep(0.1)
        assert changes == []
        tokens.add("b", "infer")
        await eventually(lambda: len(changes) == 1)
        assert [token.name for token in changes[0].tokens or ()] == ["a", "b"]
        slots = {token.name: token.slot for token in changes[0].tokens or ()}
        swap(tokens.path, b"broken")
        await eventually(lambda: metrics.gauge(STALE).labels("tokens").value == 1)
        await asyncio.sleep(0.1)
        assert len(changes) == 1, "one broken file is one failure, and no change"
        tokens.remove("a")
        await eventually(lambda: len(changes) == 2)
        assert [(token.name, token.slot) for token in changes[1].tokens or ()] == [("b", slots["b"])]
    assert metrics.gauge(STALE).labels("tokens").value == 0
    assert reloads(metrics) == {("tokens", "ok"): 2, ("tokens", "failed"): 1}


async def test_certificate_and_key_are_read_together(metrics: Metrics, tmp_path: Path) -> None:
    files = Files(tmp_path)
    one = keeper(metrics, **tls(files))
    one.start()
    async with watched(one) as changes:
        serial = files.renew()
        await eventually(lambda: len(changes) == 1)
        assert changes[0].certificates is not None
        assert changes[0].certificates.serial() == serial


async def test_a_link_that_is_swapped_counts_as_a_change(metrics: Metrics, tmp_path: Path) -> None:
    """Kubernetes swaps a link to a folder when it renews the files of a secret."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        Tokens(tmp_path / name / "tokens.txt").add(name, "infer")
    link = tmp_path / "current"
    link.symlink_to("first")
    one = keeper(metrics, tokens_file=link / "tokens.txt")
    one.start()
    async with watched(one) as changes:
        (tmp_path / "next").symlink_to("second")
        (tmp_path / "next").replace(link)
        await eventually(lambda: len(changes) == 1)
        assert [token.name for token in changes[0].tokens or ()] == ["second"]


async def test_hurry_reads_files_that_did_not_change(metrics: Metrics, tmp_path: Path) -> None:
    tokens = Tokens(tmp_path / "tokens.txt")
    tokens.add("a", "infer")
    one = keeper(metrics, tokens_file=tokens.path)
    one.start()
    async with watched(one) as changes:
        one.hurry()
        await eventually(lambda: len(changes) == 1)


async def test_an_internal_error_of_one_reload_does_not_end_later_ones(
    metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Tokens(tmp_path / "tokens.txt")
    tokens.add("a", "infer")
    one = keeper(metrics, tokens_file=tokens.path)
    one.start()
    async with watched(one) as changes:
        with monkeypatch.context() as patched:
            patched.setattr(module, "parse", None)
            one.hurry()
            await eventually(lambda: reloads(metrics).get(("tokens", "failed")) == 1)
        one.hurry()
        await eventually(lambda: len(changes) == 1)


async def test_a_token_ends_with_its_last_day(
    metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Tokens(tmp_path / "tokens.txt")
    tokens.add("a", "infer")
    tokens.add("b", "infer", expires="2027-06-30")
    today = date(2027, 6, 30)
    monkeypatch.setattr(module, "_today", lambda: today)
    one = keeper(metrics, tokens_file=tokens.path)
    assert len(one.start().tokens or ()) == 2
    async with watched(one) as changes:
        today = date(2027, 7, 1)
        await eventually(lambda: len(changes) == 1)
        assert [token.name for token in changes[0].tokens or ()] == ["a"]
