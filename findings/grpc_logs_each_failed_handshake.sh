#!/usr/bin/env bash
# A gRPC server in Python writes a line to standard error for each failed TLS handshake, although these lines are of
# level INFO and no level was set.
#
# Versions: grpcio 1.83.2, trustme 1.2.1.
# Source: https://github.com/grpc/grpc/pull/38058 (the line was lowered from ERROR to INFO, because clients cause it),
# https://github.com/grpc/grpc/issues/11002
# Expected by most: without GRPC_VERBOSITY only errors are printed, as gRPC's guide stated for years, so that a port
# scan, or a client with an expired certificate, leaves no trace in the log of a server.
# Observed: 50 handshakes without a client certificate write 50 lines of level I, which are not JSON, with any
# logging of the program. So strangers fill the log. With GRPC_VERBOSITY=ERROR nothing is written. Neither Python's
# logging nor the server's API receives the failure, so that it can be counted nowhere.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check grpcio==1.83.2 trustme==1.2.1
cd "$work"
cat > server.py <<'PYTHON'
import logging
import socket
import ssl
import sys
from concurrent import futures

import grpc
import trustme

HANDSHAKES = 50
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)  # all of Python's own logging goes to standard output
authority = trustme.CA()
server_cert, client_cert = authority.issue_cert("localhost"), authority.issue_cert("client")


def chain(certificate):
    return b"".join(pem.bytes() for pem in certificate.cert_chain_pems)


server = grpc.server(futures.ThreadPoolExecutor(1))
credentials = grpc.ssl_server_credentials(
    [(server_cert.private_key_pem.bytes(), chain(server_cert))],
    root_certificates=authority.cert_pem.bytes(),
    require_client_auth=True,
)
port = server.add_secure_port("localhost:0", credentials)
server.start()


def handshake(certificate):
    """Return whether the server keeps a connection with this client certificate; None: without one."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        certificate.configure_cert(context)
    try:
        with socket.create_connection(("localhost", port)) as raw:
            with context.wrap_socket(raw, server_hostname="localhost") as secure:
                return bool(secure.recv(1))  # the server's settings
    except (ssl.SSLError, OSError):
        return False


assert handshake(client_cert), "control: a client with a certificate connects"
assert not any(handshake(None) for _ in range(HANDSHAKES))
server.stop(0).wait()
PYTHON
count() { grep -c "Handshake failed" "$1" || true; }
env -u GRPC_VERBOSITY "$work/venv/bin/python" server.py 2> unset.txt > unset.out
GRPC_VERBOSITY=ERROR "$work/venv/bin/python" server.py 2> error.txt > error.out
echo "lines on standard error for 50 failed handshakes:"
echo "  GRPC_VERBOSITY unset:  $(count unset.txt)"
echo "  GRPC_VERBOSITY=ERROR:  $(count error.txt)"
head -1 unset.txt
[ "$(count unset.txt)" -ge 50 ] && [ "$(count error.txt)" -eq 0 ] && [ "$(count unset.out)" -eq 0 ]
