"""Takes the request id and the trace context of each RPC from its metadata, before its handler is looked up."""

from __future__ import annotations

from typing import Any

import grpc

from attnserve_server.observability.trace_context import KEYS, context_of, enter


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
