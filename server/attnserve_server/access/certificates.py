"""The server's certificate, its key, and the authorities of client certificates: read, checked, and made a TLS context.

A key is held in memory, and never written to a folder.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from attnserve_server.domain.errors import AttnserveError


class CertificatesInvalid(AttnserveError):
    """The TLS files cannot be used; the message lists the faults by setting."""

    reason = "CERTIFICATES_INVALID"

    def __init__(self, faults: list[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(faults))


class Certificates(msgspec.Struct, frozen=True):
    """The content of the TLS files, as PEM. `client_ca`: empty if no client certificate is required."""

    chain: bytes
    key: bytes
    client_ca: bytes = b""

    def check(self, now: datetime | None = None) -> None:
        """Raise CertificatesInvalid with all faults: broken files, a key of another certificate, and expired ones."""
        now = now or datetime.now(UTC)  # noqa: TID251 - certificates are valid by the wall clock
        faults: list[str] = []
        leaf = next(iter(_read(self.chain, "--tls-cert", faults)), None)
        key = _key_of(self.key, faults)
        if leaf is not None:
            faults += _wrong_time(leaf, "--tls-cert", now)
        if leaf is not None and key is not None and _public(leaf.public_key()) != _public(key.public_key()):
            faults.append("--tls-key: it is not the key of the first certificate of --tls-cert; renew both together")
        if self.client_ca:
            authorities = _read(self.client_ca, "--tls-client-ca", faults)
            wrong = [_wrong_time(one, "--tls-client-ca", now) for one in authorities]
            if wrong and all(wrong):
                faults += wrong[0]
        if faults:
            raise CertificatesInvalid(faults)
        try:
            self.context()
        except ssl.SSLError as error:
            raise CertificatesInvalid([f"--tls-cert, --tls-key: OpenSSL refuses them: {error.reason}"]) from None

    def not_after(self) -> datetime:
        """Return when the server's certificate expires."""
        return x509.load_pem_x509_certificates(self.chain)[0].not_valid_after_utc

    def serial(self) -> str:
        """Return the serial number of the server's certificate, in hexadecimal digits."""
        return f"{x509.load_pem_x509_certificates(self.chain)[0].serial_number:x}"

    def context(self) -> ssl.SSLContext:
        """Return a context of servers, TLS 1.2 or later. A client certificate is optional, and checked if there is one.

        Raises:
            ssl.SSLError: The files are not usable.
        """
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        with _in_memory(self.chain) as chain, _in_memory(self.key) as key:
            made.load_cert_chain(chain, key, password=_refuse_password)
        if self.client_ca:
            made.load_verify_locations(cadata=self.client_ca.decode("ascii", "ignore"))
            made.verify_mode = ssl.CERT_OPTIONAL
        return made


class NewestContext(ssl.SSLContext):
    """A context that makes each new connection with the newest certificates. asyncio and uvloop take it as any."""

    newest: Callable[[], ssl.SSLContext]
    on_handshake: Callable[[], None]

    def __new__(cls, newest: Callable[[], ssl.SSLContext], on_handshake: Callable[[], None]) -> NewestContext:
        """Make the context.

        Args:
            newest: returns the context for the next connection.
            on_handshake: called once for each connection.
        """
        made = super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)
        made.newest, made.on_handshake = newest, on_handshake
        return made

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        """Begin one connection."""
        self.on_handshake()
        return self.newest().wrap_bio(*args, **kwargs)


@contextlib.contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    """Give the path of a file without a folder, because OpenSSL reads chains and keys from paths alone."""
    descriptor = os.memfd_create("attnserve", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _refuse_password() -> str:
    raise ssl.SSLError("the key has a passphrase")  # in place of a question on the terminal


def _read(data: bytes, setting: str, faults: list[str]) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        faults.append(f"{setting}: it holds no PEM certificate, or a broken one; it must begin with BEGIN CERTIFICATE")
        return []


def _key_of(data: bytes, faults: list[str]) -> Any:
    try:
        return serialization.load_pem_private_key(data, None)
    except TypeError:
        faults.append("--tls-key: the key has a passphrase; write it without: openssl pkey -in KEY -out NEW")
    except (ValueError, UnsupportedAlgorithm):
        faults.append("--tls-key: it holds no PEM private key, or a broken one; it must begin with BEGIN PRIVATE KEY")
    return None


def _wrong_time(certificate: x509.Certificate, setting: str, now: datetime) -> list[str]:
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > ends:
        return [f"{setting}: the certificate expired at {ends:%Y-%m-%dT%H:%M:%SZ}; renew it"]
    if now < begins:
        return [f"{setting}: the certificate is valid from {begins:%Y-%m-%dT%H:%M:%SZ} on; check this machine's clock"]
    return []


def _public(key: Any) -> bytes:
    encoded: bytes = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return encoded
