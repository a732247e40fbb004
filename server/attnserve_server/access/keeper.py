"""Reads the TLS files and the tokens file, at the start and whenever they change or SIGHUP comes. One for each server.

At the start, an unusable file raises. Later, it changes nothing: what was read before stays in use, and a log line and
a metric report it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Final

import msgspec

from attnserve_server.access.certificates import Certificates
from attnserve_server.access.guard import Material
from attnserve_server.access.limits import Buckets, Slots
from attnserve_server.access.tokens import MAX_TOKENS, Token, parse
from attnserve_server.config import Settings
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.observability.logs import logger
from attnserve_server.observability.metrics import Metrics
from attnserve_server.observability.spec import CERTIFICATE_END, RELOADS, STALE

_log = logger(__name__)

_LOOK_EVERY_S: Final = 1.0
CERTIFICATES: Final = "certificates"
TOKENS: Final = "tokens"


class FileUnusable(AttnserveError):
    """A TLS file or the tokens file cannot be read, or is empty."""

    reason = "FILE_UNUSABLE"


class Keeper:
    """Keeps `material` as the files have it. Event loop only."""

    def __init__(self, settings: Settings, metrics: Metrics, buckets: Buckets) -> None:
        """Store the parts. `metrics` has the series of the whole server."""
        self._settings = settings
        self._metrics = metrics
        self._slots = Slots(buckets, MAX_TOKENS)
        self._files = {
            CERTIFICATES: [path for path in (settings.tls_cert, settings.tls_key, settings.tls_client_ca) if path],
            TOKENS: [settings.tokens_file] if settings.tokens_file else [],
        }
        self._stamps: dict[str, object] = {}
        self._tokens: tuple[Token, ...] = ()
        self._today = _today()
        self._hurry = asyncio.Event()
        self.material = Material(None, None)

    def start(self) -> Material:
        """Read all files, warn of what `--insecure` permits, and return what they hold.

        Raises:
            FileUnusable: A file cannot be read, or is empty.
            CertificatesInvalid: The TLS files are not usable.
            TokensInvalid: The tokens file is not usable.
        """
        for kind, paths in self._files.items():
            if paths:
                self._stamps[kind] = _stamp(paths)
                self._read(kind)
                self._metrics.gauge(STALE).labels(kind).set(0)
        settings = self._settings
        if settings.insecure:
            _log.warning(
                "insecure",
                host=settings.host,
                tls=settings.tls_cert is not None,
                callers_checked=settings.tokens_file is not None or settings.tls_client_ca is not None,
                effect="who reaches this address can read traffic without TLS, and call without a check of callers",
            )
        return self.material

    def hurry(self) -> None:
        """Read all files again now: for SIGHUP."""
        self._hurry.set()

    async def watch(self, changed: Callable[[Material], None]) -> None:
        """Read files again when they change, and call `changed` with what they hold. Ends when it is cancelled."""
        seen = dict(self._stamps)
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await self._hurry.wait()
            forced = self._hurry.is_set()
            self._hurry.clear()
            for kind in [kind for kind, paths in self._files.items() if paths]:
                stamp = await asyncio.to_thread(_stamp, self._files[kind])
                # Files that change right now are read once they have been the same twice, so that none is half written.
                if forced or (stamp != self._stamps[kind] and stamp == seen[kind]):
                    self._stamps[kind] = stamp
                    if self._reload(kind):
                        changed(self.material)
                seen[kind] = stamp
            if self._today != _today():
                self._today = _today()
                self._use(self._tokens)
                changed(self.material)

    def _reload(self, kind: str) -> bool:
        reloads, stale = self._metrics.counter(RELOADS), self._metrics.gauge(STALE).labels(kind)
        try:
            self._read(kind)
        except Exception as error:  # noqa: BLE001 - the boundary of one reload: later ones are tried
            reloads.labels(kind, "failed").inc()
            stale.set(1)
            known = isinstance(error, AttnserveError)
            reason = str(error) if known else f"internal error: {type(error).__name__}"
            effect = "what was read before stays in use"
            _log.error("reload failed", files=kind, reason=reason, effect=effect, exc_info=None if known else error)
            return False
        reloads.labels(kind, "ok").inc()
        stale.set(0)
        certificates = self.material.certificates
        serial = "" if certificates is None else certificates.serial()
        _log.info("reloaded", files=kind, certificate_serial=serial, tokens=len(self.material.tokens or ()))
        return True

    def _read(self, kind: str) -> None:
        settings = self._settings
        if kind == TOKENS:
            assert settings.tokens_file is not None, "there is a file"
            data = _content("--tokens-file", settings.tokens_file)
            self._use(parse(data, f"--tokens-file {settings.tokens_file.name}"))
            return
        paths = {
            "--tls-cert": settings.tls_cert,
            "--tls-key": settings.tls_key,
            "--tls-client-ca": settings.tls_client_ca,
        }
        certificates = Certificates(*(_content(flag, path) if path else b"" for flag, path in paths.items()))
        certificates.check()
        self.material = msgspec.structs.replace(self.material, certificates=certificates)
        self._metrics.gauge(CERTIFICATE_END).labels().set(certificates.not_after().timestamp())

    def _use(self, tokens: tuple[Token, ...]) -> None:
        valid = [token for token in tokens if not token.expired(self._today)]
        slots = self._slots.assign({token.name for token in valid})
        self._tokens = tokens
        placed = [msgspec.structs.replace(token, slot=slots[token.name]) for token in valid]
        self.material = msgspec.structs.replace(self.material, tokens=placed)


def _content(flag: str, path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileUnusable(
            f"{flag}: cannot read {path.name}: {error.strerror}; check the path and its rights"
        ) from None
    if not data.strip():
        raise FileUnusable(f"{flag}: {path.name} is empty")
    return data


def _stamp(paths: list[Path]) -> object:
    """Return what changes when one of the files does. A link is followed, so that a swapped one counts."""
    found = []
    for path in paths:
        try:
            facts = path.stat()
            found.append((facts.st_mtime_ns, facts.st_size, facts.st_ino))
        except OSError:
            found.append((0, 0, 0))
    return found


def _today() -> date:
    return datetime.now(UTC).date()  # noqa: TID251 - tokens expire by the calendar
