"""Certificates and keys are judged before they are used, and each fault names the setting and the remedy."""

from __future__ import annotations

import asyncio
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from attnserve_server.access.certificates import Certificates, CertificatesInvalid, NewestContext
from credentials import chain_of, expired, serial_of
from cryptography.hazmat.primitives import serialization

AUTHORITY = trustme.CA()
LEAF = AUTHORITY.issue_cert("localhost")
CHAIN, KEY, CA = chain_of(LEAF), LEAF.private_key_pem.bytes(), AUTHORITY.cert_pem.bytes()


def locked_key() -> bytes:
    key = serialization.load_pem_private_key(KEY, None)
    form = serialization.BestAvailableEncryption(b"secret")
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, form)


def early() -> trustme.LeafCert:
    now = datetime.now(UTC)  # noqa: TID251 - certificates are valid by the wall clock
    return AUTHORITY.issue_cert("localhost", not_before=now + timedelta(1), not_after=now + timedelta(9))


def of(leaf: trustme.LeafCert) -> tuple[bytes, bytes]:
    return chain_of(leaf), leaf.private_key_pem.bytes()


def test_a_valid_pair_is_accepted_and_described() -> None:
    Certificates(CHAIN, KEY).check()
    made = Certificates(CHAIN, KEY, CA)
    made.check()
    assert made.serial() == serial_of(LEAF)
    assert made.not_after() > datetime.now(UTC)  # noqa: TID251 - as above


@pytest.mark.parametrize(
    ("certificates", "fault"),
    [
        (Certificates(b"no PEM", KEY), "--tls-cert: it holds no PEM certificate"),
        (Certificates(CHAIN[: len(CHAIN) // 3], KEY), "--tls-cert: it holds no PEM certificate"),
        (Certificates(CHAIN, b"no PEM"), "--tls-key: it holds no PEM private key"),
        (Certificates(CHAIN, locked_key()), "--tls-key: the key has a passphrase; write it without: openssl pkey"),
        (
            Certificates(CHAIN, of(AUTHORITY.issue_cert("x"))[1]),
            "--tls-key: it is not the key of the first certificate",
        ),
        (Certificates(*of(expired(AUTHORITY))), "--tls-cert: the certificate expired at"),
        (Certificates(*of(early())), "--tls-cert: the certificate is valid from"),
        (Certificates(CHAIN, KEY, b"no PEM"), "--tls-client-ca: it holds no PEM certificate"),
        (Certificates(CHAIN, KEY, chain_of(expired(AUTHORITY))), "--tls-client-ca: the certificate expired at"),
    ],
)
def test_an_unusable_file_is_refused_with_its_setting(certificates: Certificates, fault: str) -> None:
    with pytest.raises(CertificatesInvalid) as caught:
        certificates.check()
    assert [one for one in caught.value.faults if one.startswith(fault)], caught.value.faults


def test_all_faults_are_reported_together() -> None:
    with pytest.raises(CertificatesInvalid) as caught:
        Certificates(b"x", b"y", b"z").check()
    assert len(caught.value.faults) == 3


async def test_each_new_connection_gets_the_newest_certificate(tmp_path: Path) -> None:
    contexts = [Certificates(CHAIN, KEY).context()]
    handshakes: list[int] = []
    served = NewestContext(lambda: contexts[-1], lambda: handshakes.append(1))
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=served)
    port = server.sockets[0].getsockname()[1]
    client = ssl.create_default_context()
    AUTHORITY.configure_trust(client)

    async def serial() -> str:
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname="localhost")
        found = writer.get_extra_info("peercert")["serialNumber"]
        writer.close()
        return f"{int(found, 16):x}"

    assert await serial() == serial_of(LEAF)
    other = AUTHORITY.issue_cert("localhost")
    contexts.append(Certificates(*of(other)).context())
    assert await serial() == serial_of(other)
    assert len(handshakes) == 2
    server.close()
    await server.wait_closed()
