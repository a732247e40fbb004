"""Asking a server whether it is ready, from beside it: `python -m attnserve_server.observability.probe`.

A container's HEALTHCHECK runs this every few seconds, so it takes nothing but the standard library; the command
`attnserve-server healthcheck` asks the same, but loads all that the command line needs first.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from http.client import HTTPConnection, HTTPException
from typing import Final

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 8002
DEFAULT_TIMEOUT_S: Final = 2.0
HOST_VARIABLE: Final = "ATTNSERVE_HOST"
PORT_VARIABLE: Final = "ATTNSERVE_HTTP_PORT"

_LOOPBACK: Final = {4: "127.0.0.1", 6: "::1"}


def reachable_host(host: str) -> str:
    """Where to ask a server that listens on `host`: one that listens everywhere is asked on loopback."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return _LOOPBACK[address.version] if address.is_unspecified else host


def why_not_ready(host: str, port: int, timeout_s: float = DEFAULT_TIMEOUT_S) -> str:
    """Asks `/readyz` once, past any proxy. Returns the reason why the server is not ready; empty if it is."""
    connection = HTTPConnection(reachable_host(host), port, timeout=timeout_s)
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
    """Asks where the server's own variables say. Returns the exit code: 0 if it is ready, 1 if not."""
    reason = why_not_ready(
        os.environ.get(HOST_VARIABLE, DEFAULT_HOST), int(os.environ.get(PORT_VARIABLE, DEFAULT_PORT))
    )
    sys.stdout.write(f"not ready: {reason}\n" if reason else "ready\n")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
