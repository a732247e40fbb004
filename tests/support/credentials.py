"""Certificates and tokens for tests, made when they run: an authority, files of a server, contexts of clients."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import trustme
from attnserve_server.access.tokens import made, new_secret
from cryptography import x509


@dataclass
class Files:
    """The TLS files of one server, in one folder."""

    folder: Path
    authority: trustme.CA = field(default_factory=trustme.CA)
    clients: trustme.CA = field(default_factory=trustme.CA)
    cert: Path = field(init=False)
    key: Path = field(init=False)
    client_ca: Path = field(init=False)

    def __post_init__(self) -> None:
        self.cert, self.key, self.client_ca = (self.folder / name for name in ("tls.pem", "tls.key", "clients.pem"))
        self.client_ca.write_bytes(self.clients.cert_pem.bytes())
        self.renew()

    def renew(self) -> str:
        """Write a new certificate and key. Returns its serial number, in hexadecimal digits."""
        made_now = self.authority.issue_cert("localhost", "127.0.0.1")
        swap(self.cert, chain_of(made_now))
        swap(self.key, made_now.private_key_pem.bytes())
        return serial_of(made_now)

    def channel_credentials(self, client: trustme.LeafCert | None = None) -> grpc.ChannelCredentials:
        """Credentials of a client that trusts the server's authority."""
        own = (None, None) if client is None else (client.private_key_pem.bytes(), chain_of(client))
        return grpc.ssl_channel_credentials(self.authority.cert_pem.bytes(), *own)

    def context(self, client: trustme.LeafCert | None = None) -> ssl.SSLContext:
        """The same for HTTP."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        if client is not None:
            client.configure_cert(context)
        return context


def chain_of(certificate: trustme.LeafCert) -> bytes:
    """A certificate with those of its issuers, as PEM."""
    return b"".join(one.bytes() for one in certificate.cert_chain_pems)


def serial_of(certificate: trustme.LeafCert) -> str:
    """Its serial number, in hexadecimal digits."""
    return f"{x509.load_pem_x509_certificate(certificate.cert_chain_pems[0].bytes()).serial_number:x}"


def expired(authority: trustme.CA) -> trustme.LeafCert:
    """A certificate that was valid until yesterday."""
    now = datetime.now(UTC)  # noqa: TID251 - certificates are valid by the wall clock
    return authority.issue_cert("client", not_before=now - timedelta(9), not_after=now - timedelta(1))


def swap(path: Path, data: bytes) -> None:
    """Replace a file in one step."""
    partial = path.with_name(f".{path.name}.new")
    partial.write_bytes(data)
    partial.replace(path)


@dataclass
class Tokens:
    """A tokens file, and the secrets of its tokens by name."""

    path: Path
    secrets: dict[str, str] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, scopes: str, **fields: str) -> str:
        """Make a token, write the file, and return the token."""
        secret = self.secrets[name] = new_secret()
        self.lines[name] = made(name, secret, scopes=scopes, **fields).line()
        self.write()
        return secret

    def remove(self, name: str) -> None:
        """Remove a token's line."""
        del self.lines[name]
        self.write()

    def write(self) -> None:
        """Replace the file in one step."""
        swap(self.path, ("\n".join(["# tokens of a test", *self.lines.values()]) + "\n").encode())


def bearer(secret: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a call with this token."""
    return (("authorization", f"Bearer {secret}"),)
