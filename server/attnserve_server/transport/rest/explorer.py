"""The explorer: the page `/explore` and its files. They are the same for every caller, and hold no data of the server.

The page calls the API of the same port, with the token of the person who opens it.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import Final

from starlette.responses import Response

from attnserve_server.config import Settings
from attnserve_server.transport.rest.errors import PathNotFound
from attnserve_server.transport.rest.exchange import Endpoint, Exchange

PAGE: Final = "explore.html"
MEDIA_TYPES: Final = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS: Final = {
    # Nothing is loaded from elsewhere, no inline script or style runs, and no text can become markup or code.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "cache-control": "no-cache",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def explorer_endpoints(settings: Settings) -> tuple[Endpoint, ...]:
    """Return the endpoints of the page, its files, and the redirect to it; none if it is off."""
    if not settings.explores:
        return ()
    return (
        Endpoint("GET", "/explore", _page, "The explorer: where a model looks, in a browser."),
        Endpoint("GET", "/explore/{file}", _file, "A file of the explorer."),
        Endpoint("GET", "/", _redirect, "Leads to the explorer."),
    )


@cache
def contents() -> dict[str, tuple[bytes, str, str]]:
    """Return the bytes, the media type and the entity tag of each file, by its name."""
    found = {}
    for one in (files("attnserve_server") / "explorer").iterdir():
        kind = MEDIA_TYPES.get("." + one.name.rpartition(".")[2])
        if kind is not None:
            data = one.read_bytes()
            found[one.name] = data, kind, f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    return found


async def _page(exchange: Exchange) -> Response:
    return _answer(exchange, PAGE)


async def _file(exchange: Exchange) -> Response:
    """Serve a file by its name. Raises PathNotFound if there is none."""
    name = exchange.request.path_params["file"]
    if name == PAGE or name not in contents():
        raise PathNotFound.of("path", "the explorer has no such file; open /explore")
    return _answer(exchange, name)


def _answer(exchange: Exchange, name: str) -> Response:
    data, kind, tag = contents()[name]
    headers = {**HEADERS, "etag": tag}
    # RFC 9110, 13.1.2: the list may name several tags.
    known = [one.strip().removeprefix("W/") for one in exchange.request.headers.get("if-none-match", "").split(",")]
    if tag in known:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=kind, headers=headers)


async def _redirect(_: Exchange) -> Response:
    # Relative, because a proxy may serve this port below a prefix.
    return Response(status_code=307, headers={"location": "explore", "cache-control": "no-cache"})
