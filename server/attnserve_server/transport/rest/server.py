"""The REST server: its application, with every endpoint, and its port."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from attnserve_server.access.guard import Access
from attnserve_server.observability.trace_context import KEYS
from attnserve_server.transport.http import HttpServer
from attnserve_server.transport.identity import identified
from attnserve_server.transport.receiving import ReceiveBounds
from attnserve_server.transport.rest import native, oip, openai, rerank
from attnserve_server.transport.rest.bodies import Bodies
from attnserve_server.transport.rest.document import document_handler, page_handler
from attnserve_server.transport.rest.errors import REQUEST_ID, MethodNotAllowed, PathNotFound, response_of
from attnserve_server.transport.rest.exchange import Endpoint, Rest, Served
from attnserve_server.transport.rest.explorer import explorer_endpoints
from attnserve_server.transport.rest.oip_bodies import JSON_BYTES
from attnserve_server.transport.traced import endpoint_of
from attnserve_server.transport.who import guarded


def endpoints() -> tuple[Endpoint, ...]:
    """Return all endpoints, in the order in which paths are compared."""
    infer: dict[str, Any] = {
        "accepts": native.InferBody,
        "returns": native.InferResponse,
        "media_types": (native.EVENTS,),
        "example": {
            "sequences": ["The buyer agrees to assume all liabilities."],
            "outputs": ["embedding"],
            "attention": {"layers": [-1], "head_reduction": "mean", "unit": "word", "special_tokens": "drop"},
        },
    }
    versioned = "/v1/models/{name}/versions/{version}"
    served = (
        Endpoint("POST", "/v1/models/{name}:infer", native.infer, "Run sequences, newest version.", **infer),
        Endpoint("POST", versioned + ":infer", native.infer, "Run sequences, one version.", **infer),
        Endpoint("GET", "/v1/models", native.list_models, "List the models.", returns=native.ModelList),
        Endpoint("GET", "/v1/models/{name}", native.describe_model, "Describe a model.", returns=native.ModelDetails),
        Endpoint("GET", versioned, native.describe_model, "Describe one version.", returns=native.ModelDetails),
        Endpoint(
            "POST",
            "/v1/embeddings",
            openai.embeddings,
            "Compute embeddings of texts, as OpenAI's API does.",
            accepts=openai.EmbeddingsBody,
            returns=openai.Embeddings,
            example={"model": "minilm", "input": ["The buyer pays.", "It rains."]},
        ),
        Endpoint(
            "POST",
            "/rerank",
            rerank.rerank,
            "Rank texts by their relevance to a query: `texts` as TEI, `documents` as Cohere.",
            accepts=rerank.RerankBody,
            returns=list[rerank.Rank] | rerank.Relevances,
            example={"query": "Who pays?", "texts": ["The buyer pays.", "It rains."]},
        ),
        *(
            Endpoint(
                "POST",
                path,
                rerank.cohere_rerank,
                "Rank documents by their relevance to a query, as Cohere's API does.",
                accepts=rerank.CohereBody,
                returns=rerank.Relevances,
                example={"query": "Who pays?", "documents": ["The buyer pays.", "It rains."], "top_n": 1},
            )
            for path in ("/v1/rerank", "/v2/rerank")
        ),
        *oip.endpoints(),
    )
    document = Endpoint("GET", "/openapi.json", document_handler(served), "The OpenAPI document.")
    return (*served, document, Endpoint("GET", "/openapi", page_handler(served), "The document as a page."))


def application(rest: Rest, access: Access, further: Sequence[BaseRoute] = ()) -> ASGIApp:
    """Return the application.

    Args:
        rest: what the endpoints need.
        access: who may call.
        further: other routes of the same port.
    """
    served = (*endpoints(), *explorer_endpoints(rest.settings))
    routes = [
        Route(
            one.path,
            endpoint_of(Served(one, rest), one.method, one.path, rest.metrics, rest.clock, rest.plane),
            methods=[one.method],
        )
        for one in served
    ]
    app = Starlette(routes=[*further, *routes], exception_handlers={HTTPException: _unrouted})
    app.router.redirect_slashes = False
    checked = identified(guarded(app, access))
    if not rest.settings.cors_origin:
        return checked
    # Outside of the guard: a browser sends no token before it knows that it may.
    return CORSMiddleware(
        checked,
        allow_origins=rest.settings.cors_origin,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", JSON_BYTES, *sorted(KEYS)],
        expose_headers=["retry-after", JSON_BYTES, *sorted(KEYS)],
    )


async def _unrouted(request: HttpRequest, error: Exception) -> Response:
    """Answer a request that no route takes, in the form of its path."""
    path, request_id = request.url.path, request.headers.get(REQUEST_ID, "")
    if isinstance(error, HTTPException) and error.status_code == 405:
        refusal = response_of(MethodNotAllowed.of("method", f"{path} has no {request.method}"), request_id, path)
        refusal.headers.update(error.headers or {})
        return refusal
    return response_of(PathNotFound.of("path", f"there is no {path}; /openapi.json lists all"), request_id, path)


class RestServer:
    """REST on one port. Event loop only."""

    def __init__(self, rest: Rest, access: Access, *, shared_port: bool = False) -> None:
        """Store the parts. `shared_port`: other processes of this server listen on the port too."""
        self._rest, self._access = rest, access
        self._shared_port = shared_port
        self._http: HttpServer | None = None

    async def start(self, bounds: ReceiveBounds, further: Sequence[BaseRoute] = ()) -> int:
        """Listen, and return the port.

        Args:
            bounds: of what callers send.
            further: other routes of the same port.

        Raises:
            PortUnavailable: The port is taken, or the address is not this machine's.
        """
        settings = self._rest.settings
        self._rest.bodies = Bodies(bounds.body, bounds.bodies, self._rest.clock)
        self._http = HttpServer(
            application(self._rest, self._access, further),
            self._access,
            name="rest",
            connections=max(1, settings.max_connections // 4),
        )
        return await self._http.start(settings.host, settings.rest_port, shared=self._shared_port)

    async def stop(self, grace_s: float) -> None:
        """Take no more requests, wait `grace_s` for those in progress, and cancel the rest."""
        if self._http is not None:
            await self._http.stop(grace_s)
