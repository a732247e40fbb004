"""The guard: one lookup for a token in use, an examination of all others, back-off, revocation, and sampled logs.

Its clock is a number that the tests set.
"""

from __future__ import annotations

import asyncio
import hmac

import pytest
import structlog
from attnserve_server.access import guard as module
from attnserve_server.access.guard import Guard
from attnserve_server.access.limits import GUESSES, Buckets
from attnserve_server.access.tokens import Token, made
from attnserve_server.domain.errors import Overloaded, PermissionDenied, Unauthenticated
from attnserve_server.observability.metrics import ACCESS_REFUSED, Metrics


class Clock:
    time = 100.0

    def now(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def guard(clock: Clock, metrics: Metrics) -> Guard:
    return Guard([token("a", "infer"), token("b", "infer,attention")], metrics, clock, Buckets(8))


def token(name: str, scopes: str, **fields: str) -> Token:
    return made(name, f"secret-{name}", scopes=scopes, **fields)


def cause(guard: Guard, authorization: str, peer: str = "10.0.0.1") -> str:
    try:
        guard.caller(authorization, peer, "Infer")
    except Unauthenticated as error:
        return error.cause
    return ""


async def test_a_token_in_use_is_not_examined_again(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cause(guard, "Bearer secret-a") == ""
    monkeypatch.setattr(module, "digest_of", None)
    assert guard.known["Bearer secret-a"] is guard.caller("Bearer secret-a", "10.0.0.9", "Infer")
    with pytest.raises(TypeError):
        guard.caller("Bearer secret-b", "10.0.0.9", "Infer")


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        ("", "missing"),
        ("secret-a", "malformed"),
        ("Basic secret-a", "malformed"),
        ("Bearer", "malformed"),
        ("Bearer ", "unknown"),
        ("Bearer secret-c", "unknown"),
        ("Bearer secret-a x", "unknown"),
        ("bearer secret-a", ""),
        ("BEARER  secret-a ", ""),
        ("Bearer \ud800", "unknown"),
    ],
)
async def test_an_authorization_is_judged(guard: Guard, authorization: str, expected: str) -> None:
    assert cause(guard, authorization) == expected


async def test_digests_are_compared_in_constant_time(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    in_constant_time = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return in_constant_time(one, other)

    monkeypatch.setattr(module.hmac, "compare_digest", compare)
    assert cause(guard, "Bearer secret-a") == ""
    assert len(compared) == 1
    monkeypatch.setattr(module.hmac, "compare_digest", lambda *_: False)
    assert cause(guard, "Bearer secret-b") == "unknown", "the comparison decides, and not the lookup"


async def test_after_ten_guesses_even_the_right_token_waits_unless_it_is_in_use(guard: Guard, clock: Clock) -> None:
    assert cause(guard, "Bearer secret-a") == ""
    assert {cause(guard, f"Bearer {number}") for number in range(GUESSES)} == {"unknown"}
    assert cause(guard, "Bearer secret-b") == "backed_off"
    assert cause(guard, "Bearer secret-a") == ""
    assert cause(guard, "Bearer secret-b", "10.0.0.2") == "", "another address"
    clock.time += 60
    assert cause(guard, "Bearer 11") == "unknown"


async def test_back_off_reports_how_long(guard: Guard) -> None:
    for number in range(GUESSES):
        cause(guard, f"Bearer {number}")
    with pytest.raises(Unauthenticated, match="try again in 6 s") as caught:
        guard.caller("Bearer x", "10.0.0.1", "Infer")
    assert caught.value.retry_delay_s == pytest.approx(6)


async def test_spellings_of_one_token_do_not_fill_the_memory(guard: Guard) -> None:
    for spaces in range(1000):
        assert cause(guard, "Bearer" + " " * (spaces + 1) + "secret-a") == ""
    assert cause(guard, "bearer secret-a") == ""
    assert set(guard.known) == {"Bearer secret-a", "bearer secret-a"}


async def test_reload_keeps_tokens_in_use_and_revokes_the_others(guard: Guard) -> None:
    first, second = (guard.caller(f"Bearer secret-{name}", "10.0.0.1", "Infer") for name in "ab")
    guard.update([token("a", "infer,attention"), token("c", "metrics")])
    assert guard.known == {"Bearer secret-a": first}
    first.admit(1, "Infer", attention=True)
    with pytest.raises(Unauthenticated):
        second.admit(1, "Infer", attention=False)
    assert cause(guard, "Bearer secret-b") == "unknown"
    assert cause(guard, "Bearer secret-c") == ""


async def test_attention_needs_its_scope(guard: Guard) -> None:
    caller = guard.caller("Bearer secret-a", "10.0.0.1", "Infer")
    caller.admit(1, "Infer", attention=False)
    with pytest.raises(PermissionDenied, match="needs the scope 'attention', which the token 'a' lacks"):
        caller.admit(1, "Infer", attention=True)


async def test_quota_counts_sequences(clock: Clock, metrics: Metrics) -> None:
    guard = Guard([token("a", "infer", rate="2", burst="8")], metrics, clock, Buckets(8))
    caller = guard.caller("Bearer secret-a", "10.0.0.1", "Infer")
    caller.admit(8, "Infer", attention=False)
    with pytest.raises(Overloaded) as caught:
        caller.admit(4, "Infer", attention=False)
    assert (caught.value.cause, caught.value.retry_delay_s) == ("quota", pytest.approx(2))
    assert str(caught.value) == "overloaded (quota): the token's 2 sequences a second are used up; try again in 2.000 s"
    assert metrics.counter(ACCESS_REFUSED).labels("quota").value == 1
    clock.time += 2
    caller.admit(4, "Infer", attention=False)


async def test_refusals_are_counted_by_cause(guard: Guard, metrics: Metrics) -> None:
    for authorization in ("", "x", "Bearer x"):
        cause(guard, authorization)
    counted = {labels: one.value for labels, one in metrics.counter(ACCESS_REFUSED).series.items()}
    assert counted == {("missing",): 1, ("malformed",): 1, ("unknown",): 1}


async def test_ten_refusals_of_each_cause_are_logged_in_a_period(
    clock: Clock, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOGGED_PERIOD_S", 0.1)
    guard = Guard([token("a", "infer")], metrics, clock, Buckets(8))
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    with structlog.testing.capture_logs() as lines:
        for _ in range(50):
            cause(guard, "")
        cause(guard, "x")
        loop.call_later(0.2, ended.set_result, None)  # after the period
        await ended
        cause(guard, "")
    logged = [line["cause"] for line in lines if line["event"] == "access refused"]
    assert logged == ["missing"] * 10 + ["malformed", "missing"]
    (rest,) = (line for line in lines if line["event"] == "refusals were not logged")
    assert (rest["reason"], rest["suppressed"], rest["logged"], rest["log_level"]) == ("missing", 40, 10, "warning")
