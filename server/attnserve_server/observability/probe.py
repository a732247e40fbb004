"""The readiness check of a container: `python -m attnserve_server.observability.probe`.

A HEALTHCHECK runs it every few seconds, so it imports the standard library only. The command `attnserve-server
healthcheck` makes the same check, but imports the libraries of the command line first.

The inputs are the variables ATTNSERVE_HOST, ATTNSERVE_HTTP_PORT and ATTNSERVE_TLS_CERT. It prints one line,
and exits with 0 if the server is ready, else with 1.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
import sys
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Final

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 8002
DEFAULT_TIMEOUT_S: Final = 2.0
HOST_VARIABLE: Final = "ATTNSERVE_HOST"
PORT_VARIABLE: Final = "ATTNSERVE_HTTP_PORT"
TLS_VARIABLE: Final = "ATTNSERVE_TLS_CERT"

_LOOPBACK: Final = {4: "127.0.0.1", 6: "::1"}


def reachable_host(host: str) -> str:
    """Return the address to check for a server that listens on `host`: loopback if it listens on all addresses."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return _LOOPBACK[address.version] if address.is_unspecified else host


def why_not_ready(host: str, port: int, timeout_s: float = DEFAULT_TIMEOUT_S, *, tls: bool = False) -> str:
    """Request `/readyz` once, without a proxy.

    Args:
        host: address that the server listens on.
        port: its HTTP port.
        timeout_s: seconds to wait for the connection and for the answer.
        tls: whether the server uses TLS. Its certificate is not checked, because its names are not this address, and
            the probe sends no secret.

    Returns:
        Why the server is not ready; empty if it is.
    """
    connection = HTTPConnection(reachable_host(host), port, timeout=timeout_s)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = HTTPSConnection(reachable_host(host), port, timeout=timeout_s, context=context)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        body = answer.read(4096).decode("utf-8", "replace").strip()
    except (OSError, HTTPException) as error:
        return f"no answer from port {port}: {type(error).__name__}"
    finally:
        connection.close()
    return "" if answer.status == 200 else f"/readyz answered {answer.status}: {body}"


def main() -> int:
    """Check the server at the address in its own variables. Return the exit code: 0 if it is ready, 1 if not.

    Raises:
        ValueError: the variable of the port is no integer.
    """
    reason = why_not_ready(
        os.environ.get(HOST_VARIABLE, DEFAULT_HOST),
        int(os.environ.get(PORT_VARIABLE, DEFAULT_PORT)),
        tls=bool(os.environ.get(TLS_VARIABLE)),
    )
    sys.stdout.write(f"not ready: {reason}\n" if reason else "ready\n")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
