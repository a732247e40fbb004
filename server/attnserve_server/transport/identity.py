"""Takes the request id and the trace context of each call from its metadata or headers, before it is looked up."""

from __future__ import annotations

from typing import Any, Final

import grpc
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from attnserve_server.observability.trace_context import KEYS, context_of, enter

_HEADERS: Final = frozenset(key.encode() for key in KEYS)


class IdentifiedHandlers(grpc.GenericRpcHandler):
    """Serves the methods of `inner`. A call without such metadata costs one look at its keys."""

    def __init__(self, inner: grpc.GenericRpcHandler) -> None:
        self._inner = inner

    def service(self, handler_call_details: Any) -> Any:
        """Return the handler of a call. gRPC looks it up in the call's own task."""
        pairs = handler_call_details.invocation_metadata
        for key, _ in pairs:
            if key in KEYS:
                context = context_of(pairs)
                if context is not None:
                    enter(context)
                break
        return self._inner.service(handler_call_details)


def identified(app: ASGIApp) -> ASGIApp:
    """Return `app` with the same for HTTP: what came with a request is logged, and returned as headers of its answer.

    Headers that the application sets stay as they are.
    """

    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        pairs = [(key.decode(), value.decode("latin-1")) for key, value in _headers(scope) if key in _HEADERS]
        sent = context_of(pairs) if pairs else None
        if sent is None:
            await app(scope, receive, send)
            return
        enter(sent)  # of this request's own task
        own = [(key.encode(), value.encode()) for key, value in sent.metadata]

        async def returned(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                known = {key.lower() for key, _ in headers}
                message = {**message, "headers": [*headers, *(pair for pair in own if pair[0] not in known)]}
            await send(message)

        await app(scope, receive, returned)

    return served


def _headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    found: list[tuple[bytes, bytes]] = scope["headers"] if scope["type"] == "http" else []
    return found
