"""Bearer tokens and their file: one line for each token, with its digest, and never the token itself.

    # name     digest             scopes                 quota and end, each optional
    nightly    sha256:5b1f...09e2 scopes=infer           rate=50 burst=100
    dashboard  sha256:77c0...1fa4 scopes=infer,attention expires=2027-06-30
    prometheus sha256:e0aa...b713 scopes=metrics

A token is 256 random bits, so that its plain SHA-256 cannot be reversed by guessing: ADR 9 has the reasons.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
from collections.abc import Iterator
from datetime import date
from typing import Final

import msgspec

from attnserve_server.domain.errors import AttnserveError

SCOPES: Final = ("infer", "attention", "metrics", "admin")
MAX_TOKENS: Final = 10_000
MAX_FILE_BYTES: Final = 4 * 2**20
PREFIX: Final = "attn_"
"""Begins every token, so that scanners for leaked secrets can find them."""
_RANDOM_BYTES: Final = 32
_MAX_RATE: Final = 1e6
_MAX_FAULTS: Final = 16
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")


class TokensInvalid(AttnserveError):
    """The tokens file cannot be used; the message lists the faults by line."""

    reason = "TOKENS_INVALID"

    def __init__(self, place: str, faults: list[str]) -> None:
        self.faults = tuple(faults)
        more = f"; and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
        super().__init__(f"{place}: " + "; ".join(faults[:_MAX_FAULTS]) + more)


class Token(msgspec.Struct, frozen=True):
    """One line of the file."""

    name: str
    digest: bytes
    """SHA-256 of the token's bytes."""
    scopes: tuple[str, ...]
    rate: float = 0.0
    """Sequences a second over a long time; 0: no quota."""
    burst: float = 0.0
    """Sequences at once after a pause; with a quota at least 1."""
    expires: str = ""
    """Last day on which it is valid, in UTC, as YYYY-MM-DD; empty: it does not expire."""
    slot: int = 0
    """Place of its quota in the buckets that all processes of a server share."""

    def expired(self, today: date) -> bool:
        """Return whether its last day is over."""
        return bool(self.expires) and date.fromisoformat(self.expires) < today

    def line(self) -> str:
        """Return its line of the file, without a line end."""
        parts = [self.name, f"sha256:{self.digest.hex()}", f"scopes={','.join(self.scopes)}"]
        if self.rate:
            parts += [f"rate={self.rate:g}", f"burst={self.burst:g}"]
        return " ".join(parts + ([f"expires={self.expires}"] if self.expires else []))


def new_secret() -> str:
    """Return a new token: a prefix and 256 random bits."""
    return PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)


def digest_of(secret: str) -> bytes:
    """Return the SHA-256 of a token."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def parse(data: bytes, place: str) -> tuple[Token, ...]:
    """Read a tokens file. Expired tokens are among the result.

    Args:
        data: the file's content.
        place: its name, for messages.

    Raises:
        TokensInvalid: with all faults, each with its line, the value and what is allowed.
    """
    if len(data) > MAX_FILE_BYTES:
        raise TokensInvalid(place, [f"holds {len(data)} bytes; at most {MAX_FILE_BYTES} are allowed"])
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise TokensInvalid(place, [f"byte {error.start} is not UTF-8; write it as text"]) from None
    found = _Found()
    for number, line in enumerate(lines, 1):
        words = line.split("#", 1)[0].split()
        if words:
            found.take(number, words)
    if len(found.tokens) > MAX_TOKENS:
        found.faults.append(f"holds {len(found.tokens)} tokens; at most {MAX_TOKENS} are allowed")
    if not found.tokens and not found.faults:
        found.faults.append("holds no token, so that no call could be served; run `attnserve-server token new`")
    if found.faults:
        raise TokensInvalid(place, found.faults)
    return tuple(found.tokens.values())


class _Found:
    """The lines of a file so far."""

    def __init__(self) -> None:
        self.tokens: dict[str, Token] = {}
        self.faults: list[str] = []
        self._digests: dict[bytes, str] = {}

    def take(self, number: int, words: list[str]) -> None:
        """Read one line, without its comment."""
        token, wrong = _token(words)
        if token is None:
            pass
        elif token.name in self.tokens:
            wrong.append(f"the name {token.name!r} is used before; give each token another name")
        elif token.digest in self._digests:
            wrong.append(f"{token.name!r} has the digest of {self._digests[token.digest]!r}; make another token")
        else:
            self.tokens[token.name], self._digests[token.digest] = token, token.name
        self.faults += [f"line {number}: {fault}" for fault in wrong]


def made(name: str, secret: str, **fields: str) -> Token:
    """Make a token's line from its parts, as text.

    Args:
        name: of the token.
        secret: the token.
        fields: `scopes`, and `rate`, `burst` and `expires` if they are given.

    Raises:
        TokensInvalid: with all faults.
    """
    words = [name or "''", f"sha256:{digest_of(secret).hex()}"]
    token, faults = _token(words + [f"{key}={value}" for key, value in fields.items()])
    if token is None or faults:
        raise TokensInvalid("the token", faults)
    return token


def _token(words: list[str]) -> tuple[Token | None, list[str]]:
    faults = list(_faults_of_start(words))
    fields: dict[str, str] = {}
    for word in words[2:]:
        key, equals, value = word.partition("=")
        if not equals or key not in {"scopes", "rate", "burst", "expires"}:
            faults.append(f"{word[:40]!r} is not scopes=, rate=, burst= or expires=")
        elif key in fields:
            faults.append(f"{key}= is given twice")
        else:
            fields[key] = value
    scopes = _scopes(fields.get("scopes"), faults)
    rate, burst = (_number(key, fields.get(key), faults) for key in ("rate", "burst"))
    if burst and not rate:
        faults.append("burst= needs rate=, in sequences a second")
    expires = _day(fields.get("expires", ""), faults)
    if faults:
        return None, faults
    digest = bytes.fromhex(words[1].removeprefix("sha256:"))
    return Token(words[0], digest, scopes, rate, burst or max(1.0, rate) if rate else 0.0, expires), []


def _faults_of_start(words: list[str]) -> Iterator[str]:
    if _NAME.fullmatch(words[0]) is None:
        yield f"the name {words[0][:64]!r} is not 1 to 63 of a-z, 0-9, '.', '_' and '-', the first a letter or a digit"
    if len(words) < 2 or _DIGEST.fullmatch(words[1]) is None:
        # The word is not quoted: it may be a token that was written in place of its digest.
        yield "the second word is not sha256: and 64 hexadecimal digits; `attnserve-server token new` makes the line"


def _number(key: str, text: str | None, faults: list[str]) -> float:
    if text is None:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    least = 1.0 if key == "burst" else 1e-3
    if not least <= value <= _MAX_RATE:
        faults.append(f"{key} is {text[:40]!r}; it must be a number from {least:g} to {_MAX_RATE:g}")
        return 0.0
    return value


def _scopes(text: str | None, faults: list[str]) -> tuple[str, ...]:
    allowed = ",".join(SCOPES)
    if text is None:
        faults.append(f"scopes= is missing; give some of {allowed}")
        return ()
    scopes = tuple(dict.fromkeys(text.split(",")))
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown:
        faults.append(f"scopes has {unknown[0][:40]!r}; allowed are {allowed}")
    elif "attention" in scopes and "infer" not in scopes:
        faults.append("scopes has 'attention' without 'infer', which every inference needs; add it")
    return scopes


def _day(text: str, faults: list[str]) -> str:
    try:
        valid = not text or date.fromisoformat(text).isoformat() == text
    except ValueError:
        valid = False
    if not valid:
        faults.append(f"expires is {text[:40]!r}; write a day as 2027-06-30")
    return text
