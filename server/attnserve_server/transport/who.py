"""Who may call: the scope of each gRPC method and HTTP path, the check before each handler, and TLS of both ports.

Deny is the default: a method or a path without a scope here is not served to anyone, once tokens are needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import grpc
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from attnserve_server.access.certificates import Certificates
from attnserve_server.access.guard import CALLER, Access, Caller, Guard
from attnserve_server.domain.errors import PermissionDenied, Unauthenticated
from attnserve_server.transport.admin import METHODS
from attnserve_server.transport.admin import SERVICE as MODEL_SERVICE
from attnserve_server.transport.oip.servicer import METHODS as OIP_METHODS
from attnserve_server.transport.oip.servicer import SERVICE as OIP_SERVICE
from attnserve_server.transport.reflection import CHANNELZ, CHANNELZ_METHODS, REFLECTION
from attnserve_server.transport.rest.errors import CertificateRequired, PathNotFound, response_of
from attnserve_server.transport.rpc import Context
from attnserve_server.transport.servicer import SERVICE, RpcMetrics
from attnserve_server.transport.sockets import address_of, site_of
from attnserve_server.transport.status import status_of, trailers_of
from attnserve_server.transport.validation import is_request_id

FREE: Final = ""
"""The scope of what needs no token: health checks, because monitors seldom hold one, and the explorer's files, which
hold no data."""
_HEALTH: Final = "grpc.health.v1.Health"
SCOPE_OF: Final[Mapping[str, str]] = {
    f"/{SERVICE}/Infer": "infer",
    f"/{SERVICE}/StreamInfer": "infer",
    f"/{SERVICE}/ListModels": "infer",
    f"/{SERVICE}/GetModel": "infer",
    f"/{SERVICE}/GetLoad": "infer",
    f"/{SERVICE}/GetTokenizer": "infer",
    **{f"/{MODEL_SERVICE}/{method}": "admin" for method in METHODS},
    **{f"/{service}/ServerReflectionInfo": "admin" for service in REFLECTION},
    **{f"/{CHANNELZ}/{method}": "admin" for method in CHANNELZ_METHODS},
    **{f"/{OIP_SERVICE}/{method}": "infer" for method in OIP_METHODS},
    **dict.fromkeys((f"/{OIP_SERVICE}/ServerLive", f"/{OIP_SERVICE}/ServerReady"), FREE),
    **dict.fromkeys((f"/{OIP_SERVICE}/RepositoryModelLoad", f"/{OIP_SERVICE}/RepositoryModelUnload"), "admin"),
    f"/{_HEALTH}/Check": FREE,
    f"/{_HEALTH}/Watch": FREE,
}
SCOPE_OF_PATH: Final[Mapping[str, str]] = {
    "/livez": FREE,
    "/readyz": FREE,
    "/metrics": "metrics",
    "/openapi.json": "infer",
    "/openapi": "infer",
    "/": FREE,
    "/explore": FREE,
    "/explore/{file}": FREE,
    "/v1/models": "infer",
    "/v1/models/{name}:infer": "infer",
    "/v1/models/{name}": "infer",
    "/v1/models/{name}/versions/{version}:infer": "infer",
    "/v1/models/{name}/versions/{version}": "infer",
    "/v1/embeddings": "infer",
    "/rerank": "infer",
    "/v1/rerank": "infer",
    "/v2/rerank": "infer",
    "/v2": "infer",
    "/v2/health/live": FREE,
    "/v2/health/ready": FREE,
    "/v2/models/stats": "infer",
    "/v2/repository/index": "infer",
    "/v2/repository/models/{name}/load": "admin",
    "/v2/repository/models/{name}/unload": "admin",
    **{
        f"/v2/models/{{name}}{version}{subject}": "infer"
        for version in ("", "/versions/{version}")
        for subject in ("/infer", "", "/ready", "/config", "/stats")
    },
}
"""Of HTTP paths, in the order in which they are compared. A part in braces is anything but a slash."""


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


def path_of(requested: str) -> str | None:
    """Return the path of `SCOPE_OF_PATH` that a requested one has the form of; None if there is none."""
    if requested in SCOPE_OF_PATH:
        return requested
    return next((path for path, form in _FORMS if form.fullmatch(requested)), None)


_FORMS: Final = [
    (path, re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path)))) for path in SCOPE_OF_PATH if "{" in path
]


def _refusal(scope: Scope, access: Access) -> Response | None:
    path = scope["path"]
    known = path_of(path)
    wanted = None if known is None else SCOPE_OF_PATH[known]
    guard = access.guard
    if wanted == FREE:
        return None
    request_id = _header(scope, b"x-request-id")
    request_id = request_id if is_request_id(request_id) else ""
    if access.needs_certificate and not scope["state"].get("certified"):
        access.refused_without_certificate()
        return response_of(CertificateRequired(), request_id, path)
    if guard is None:
        return None
    peer = site_of((scope.get("client") or ("unknown",))[0])
    named = known or "unknown"
    try:
        caller = guard.caller(_header(scope, b"authorization"), peer, named)
        if wanted is None:
            return response_of(PathNotFound.of("path", "there is no such path"), request_id, path)
        if wanted not in caller.scopes:
            caller.deny(wanted, named, named)
    except (Unauthenticated, PermissionDenied) as error:
        return response_of(error, request_id, path)
    CALLER.set(caller)  # of this request's own task
    return None


def _header(scope: Scope, name: bytes) -> str:
    found: bytes = next((value for key, value in scope["headers"] if key == name), b"")
    return found.decode("latin-1")


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
