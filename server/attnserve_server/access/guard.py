"""The guard: whose token may do what, now. Counts refusals, logs a sample of them, and holds guessing back.

A token in use costs a call one dictionary lookup. Any other is examined once, if its address has not guessed too often.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, NoReturn

import msgspec

from attnserve_server.access.certificates import Certificates
from attnserve_server.access.limits import Buckets
from attnserve_server.access.tokens import Token, digest_of
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import Overloaded, PermissionDenied, Unauthenticated
from attnserve_server.observability.logs import Sampler, logger
from attnserve_server.observability.metrics import ACCESS_REFUSED, TLS_HANDSHAKES, Metrics

_log = logger(__name__)

_SCHEME: Final = "bearer "
_LOGGED: Final = 10
"""Refusals of one cause that are logged in each period: someone who guesses must not fill a disk."""
_LOGGED_PERIOD_S: Final = 60.0


class Material(msgspec.Struct, tag=True):
    """All that decides who may do what, as read from the files. A supervisor sends it to its fronts.

    `tokens`: without the expired ones; None: no token is needed. `certificates`; None: there is no TLS.
    """

    certificates: Certificates | None
    tokens: list[Token] | None


@dataclass(slots=True, eq=False)
class Caller:
    """The holder of a token. A reload changes it in place, so that open streams follow. Event loop only."""

    token: Token
    scopes: frozenset[str]
    guard: Guard
    revoked: bool = False

    def admit(self, sequences: int, method: str, *, attention: bool) -> None:
        """Take one request from the quota.

        Args:
            sequences: in the request.
            method: for the log.
            attention: whether it selects attention.

        Raises:
            Unauthenticated: The token was revoked, or expired, since the stream began.
            PermissionDenied: The token lacks the scope.
            Overloaded: The quota is used up.
        """
        if self.revoked:
            self.guard.refuse(Unauthenticated("unknown"), method, "", self.token.name)
        if attention and "attention" not in self.scopes:
            self.deny("attention", method, "a selection of attention")
        token = self.token
        if token.rate:
            wait_s = self.guard.take(token, max(1, sequences))
            if wait_s:
                self.guard.count("quota")
                raise Overloaded("quota", token.rate, sequences, wait_s)

    def deny(self, scope: str, method: str, what: str) -> NoReturn:
        """Refuse a call for a missing scope. Raises PermissionDenied."""
        self.guard.refuse(PermissionDenied(scope, self.token.name, what), method, "", self.token.name)


CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)
"""The caller of the call that the current task serves; None where no token is needed."""


class Guard:
    """Checks the calls of one process. Event loop only."""

    def __init__(self, tokens: Sequence[Token], metrics: Metrics, clock: Clock, buckets: Buckets) -> None:
        self._clock = clock
        self._buckets = buckets
        self._refused = metrics.counter(ACCESS_REFUSED)
        self._logged = Sampler(_LOGGED, _LOGGED_PERIOD_S, logging.WARNING)
        self._by_digest: dict[bytes, Caller] = {}
        self.known: dict[str, Caller] = {}
        """Callers by the authorization that they sent before, in the usual two spellings."""
        self.update(tokens)

    def update(self, tokens: Sequence[Token]) -> None:
        """Replace all tokens. Those that are left out are refused from now on, on open streams too."""
        before, self._by_digest = self._by_digest, {}
        for token in tokens:
            caller = before.pop(token.digest, None) or Caller(token, frozenset(), self)
            caller.token, caller.scopes = token, frozenset(token.scopes)
            self._by_digest[token.digest] = caller
        for caller in before.values():
            caller.revoked = True
        self.known = {sent: caller for sent, caller in self.known.items() if not caller.revoked}

    def caller(self, authorization: str, peer: str, method: str) -> Caller:
        """Return who sent this authorization.

        Args:
            authorization: the header as it came; empty: none.
            peer: the caller's address, without its port.
            method: for the log.

        Raises:
            Unauthenticated: It is no valid token, or its address has to wait before another one is examined.
        """
        found = self.known.get(authorization)
        if found is not None:
            return found
        if not authorization:
            self.refuse(Unauthenticated("missing"), method, peer)
        if authorization[: len(_SCHEME)].lower() != _SCHEME:
            self.refuse(Unauthenticated("malformed"), method, peer)
        wait_s = self._buckets.guess(peer, self._clock.now())
        if wait_s:
            self.refuse(Unauthenticated("backed_off", wait_s), method, peer)
        secret = authorization[len(_SCHEME) :].strip()
        digest = digest_of(secret)
        found = self._by_digest.get(digest)
        # The comparison takes the same time wherever the digests differ.
        if found is None or not hmac.compare_digest(found.token.digest, digest):
            self.refuse(Unauthenticated("unknown"), method, peer)
        self._buckets.right(peer)
        if authorization in {f"Bearer {secret}", f"bearer {secret}"}:  # other spellings would fill the memory
            self.known[authorization] = found
        return found

    def take(self, token: Token, sequences: int) -> float:
        """Take sequences from a token's quota, or return the seconds until that is possible; 0: they were taken."""
        return self._buckets.take(token.slot, sequences, token.rate, token.burst, self._clock.now())

    def count(self, cause: str) -> None:
        """Count a refusal that is not logged."""
        self._refused.labels(cause).inc()

    def refuse(self, error: Unauthenticated | PermissionDenied, method: str, peer: str, token: str = "") -> NoReturn:
        """Count a refusal, log it if few were logged of late, and raise it."""
        cause = error.cause if isinstance(error, Unauthenticated) else "scope"
        self.count(cause)
        if self._logged.passes(cause):
            about = {"method": method, "peer": peer, "token": token, "scope": getattr(error, "scope", "")}
            _log.warning("access refused", cause=cause, **{key: text for key, text in about.items() if text})
        raise error


class Access:
    """What one process lets in: its guard, and the certificates in use, which gRPC's threads read too."""

    def __init__(self, material: Material, metrics: Metrics, clock: Clock, buckets: Buckets) -> None:
        """Begin with `material`, which has been checked."""
        self.certificates = material.certificates
        self.guard = None if material.tokens is None else Guard(material.tokens, metrics, clock, buckets)
        self._uncertified = metrics.counter(ACCESS_REFUSED).labels("certificate")
        self.handshakes = {port: metrics.counter(TLS_HANDSHAKES).labels(port) for port in ("grpc", "http", "rest")}

    @property
    def needs_certificate(self) -> bool:
        """Whether callers must have a client certificate."""
        return self.certificates is not None and bool(self.certificates.client_ca)

    def refused_without_certificate(self) -> None:
        """Count a call without a client certificate."""
        self._uncertified.inc()

    def update(self, material: Material) -> None:
        """Use new files. What they may not change is TLS itself and whether tokens are needed: that takes a restart."""
        if material.certificates is not None and self.certificates is not None:
            self.certificates = material.certificates
        if material.tokens is not None and self.guard is not None:
            self.guard.update(material.tokens)
