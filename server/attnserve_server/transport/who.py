"""Who may call: the scope of each gRPC method and HTTP path, the check before each handler, and TLS of both ports.

Deny is the default: a method or a path without a scope here is not served to anyone, once tokens are needed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import grpc
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from attnserve_server.access.certificates import Certificates
from attnserve_server.access.guard import CALLER, Access, Caller, Guard
from attnserve_server.domain.errors import PermissionDenied, Unauthenticated
from attnserve_server.transport.admin import METHODS
from attnserve_server.transport.admin import SERVICE as MODEL_SERVICE
from attnserve_server.transport.servicer import SERVICE, Context, RpcMetrics
from attnserve_server.transport.sockets import address_of, site_of
from attnserve_server.transport.status import status_of, trailers_of

FREE: Final = ""
"""The scope of what needs no token: health checks, because monitors seldom hold one."""
_HEALTH: Final = "grpc.health.v1.Health"
SCOPE_OF: Final[Mapping[str, str]] = {
    f"/{SERVICE}/Infer": "infer",
    f"/{SERVICE}/StreamInfer": "infer",
    f"/{SERVICE}/ListModels": "infer",
    f"/{SERVICE}/GetModel": "infer",
    **{f"/{MODEL_SERVICE}/{method}": "admin" for method in METHODS},
    f"/{_HEALTH}/Check": FREE,
    f"/{_HEALTH}/Watch": FREE,
}
SCOPE_OF_PATH: Final[Mapping[str, str]] = {"/livez": FREE, "/readyz": FREE, "/metrics": "metrics"}


class _Details(NamedTuple):
    """What gRPC passes to a generic handler, for a lookup of our own."""

    method: str
    invocation_metadata: tuple[tuple[str, str], ...] = ()


class GuardedHandlers(grpc.GenericRpcHandler):
    """Serves the methods of `SCOPE_OF` to callers with a token of their scope. Event loop only."""

    def __init__(self, guard: Guard, inner: Sequence[grpc.GenericRpcHandler], metrics: RpcMetrics) -> None:
        """Look up each method once; `inner` are the handlers of all services."""
        self._guard = guard
        self._served: dict[str, tuple[str, Any]] = {}
        self._checked: dict[str, Any] = {}
        for method, scope in SCOPE_OF.items():
            details: Any = _Details(method)
            handler = next(filter(None, (one.service(details) for one in inner)), None)
            if handler is None:
                continue
            self._served[method] = scope, handler
            if scope == FREE:
                continue
            service, name = method[1:].split("/")
            kind = "bidi_stream" if handler.request_streaming else "unary"
            # It reads no message before a refusal, so that refused callers cannot fill the memory.
            self._checked[method] = grpc.stream_stream_rpc_method_handler(
                partial(self._check, method, metrics.measured(kind, service, name, _raise))
            )
        self._unknown: Any = grpc.stream_stream_rpc_method_handler(self._refuse_unknown)

    def service(self, handler_call_details: Any) -> Any:
        """Return the handler of a call: the method's own for a token in use that has its scope."""
        method = handler_call_details.method
        scope, handler = self._served.get(method, (None, None))
        if scope == FREE:
            return handler
        caller = self._guard.known.get(_authorization(handler_call_details.invocation_metadata))
        if caller is None:
            return self._checked.get(method, self._unknown)
        if scope is None:
            return None  # gRPC answers UNIMPLEMENTED
        if scope not in caller.scopes:
            return self._checked[method]
        CALLER.set(caller)  # of this call's own task
        return handler

    def _caller(self, method: str, context: Context) -> Caller:
        authorization = _authorization(context.invocation_metadata() or ())
        return self._guard.caller(authorization, address_of(context.peer()), method)

    async def _check(self, method: str, refuse: Any, _: Any, context: Context) -> None:
        """Serve the first call with a token, whose handler is not chosen yet; or refuse the call."""
        scope, handler = self._served[method]
        try:
            caller = self._caller(method, context)
            if scope not in caller.scopes:
                caller.deny(scope, method, method)
        except (Unauthenticated, PermissionDenied) as error:
            await refuse(error, context)
            return
        CALLER.set(caller)
        if handler.request_streaming:
            await handler.stream_stream(None, context)
            return
        data: Any = await context.read()
        if data is not grpc.aio.EOF:
            await context.write(await handler.unary_unary(data, context))

    async def _refuse_unknown(self, _: Any, context: Context) -> None:
        try:
            self._caller("unknown", context)
        except Unauthenticated as error:
            status = status_of(error, "")
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, status.message, trailers_of(status))
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")


def server_credentials(access: Access) -> grpc.ServerCredentials | None:
    """Return credentials that use the newest certificates for each new connection; None without TLS.

    gRPC's threads call for the certificates. Connections that are open stay as they are.
    """
    current = access.certificates
    if current is None:
        return None
    loop = asyncio.get_running_loop()
    count = access.handshakes["grpc"].inc

    def newest() -> Any:  # the declared type omits None, which gRPC documents
        nonlocal current
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            loop.call_soon_threadsafe(count)
        if access.certificates is current:
            return None  # gRPC keeps those that it has
        current = access.certificates
        assert current is not None, "TLS is not turned off by a reload"
        return _configuration(current)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(current), newest, require_client_authentication=access.needs_certificate
    )


class CertifiedProtocol(H11Protocol):
    """uvicorn's protocol, which also states in `scope["state"]` whether the client has a checked certificate."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """Begin a connection, after its handshake."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "certified": bool(transport.get_extra_info("peercert"))}


def guarded(app: ASGIApp, access: Access) -> ASGIApp:
    """Return `app` behind the checks of certificate, token and scope."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := _refusal(scope, access)) is not None:
            await refusal(scope, receive, send)
            return
        await app(scope, receive, send)

    return checked


def _refusal(scope: Scope, access: Access) -> JSONResponse | None:
    path = scope["path"]
    wanted = SCOPE_OF_PATH.get(path)
    guard = access.guard
    if wanted == FREE:
        return None
    if access.needs_certificate and not scope["state"].get("certified"):
        access.refused_without_certificate()
        return _problem(403, "CERTIFICATE_REQUIRED", "this path needs a client certificate of --tls-client-ca")
    if guard is None:
        return None
    header = next((value for key, value in scope["headers"] if key == b"authorization"), b"").decode("latin-1")
    peer = site_of((scope.get("client") or ("unknown",))[0])
    named = path if wanted is not None else "unknown"
    try:
        caller = guard.caller(header, peer, named)
        if wanted is not None and wanted not in caller.scopes:
            caller.deny(wanted, named, named)
    except Unauthenticated as error:
        headers = {"www-authenticate": "Bearer"}
        if error.retry_delay_s:
            headers["retry-after"] = str(int(error.retry_delay_s) + 1)
        return _problem(401, error.reason, str(error), headers)
    except PermissionDenied as error:
        return _problem(403, error.reason, str(error))
    return None  # an unknown path is not found


def _problem(status: int, reason: str, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return a refusal as problem details. Source: RFC 9457."""
    content = {"type": "about:blank", "status": status, "reason": reason, "detail": detail}
    return JSONResponse(content, status, headers, media_type="application/problem+json")


async def _raise(error: Exception, _: Context) -> None:
    raise error


def _authorization(metadata: Any) -> str:
    for key, value in metadata:
        if key == "authorization":
            return str(value)
    return ""


def _configuration(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(certificates.key, certificates.chain)], root_certificates=certificates.client_ca or None
    )
