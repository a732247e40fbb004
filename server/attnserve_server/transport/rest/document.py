"""The OpenAPI document of all endpoints, made from their types, and a page that shows it and loads nothing.

Source: OpenAPI Specification 3.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from typing import Any, Final

import msgspec
from starlette.responses import Response

from attnserve_server import __version__
from attnserve_server.transport.rest.errors import is_openai
from attnserve_server.transport.rest.exchange import Endpoint, Exchange, Handler
from attnserve_server.transport.rest.native import json_of

_REFERENCE: Final = "#/components/schemas/{name}"
_STATUSES: Final = {
    400: "the request is invalid, or the model cannot do what it selects",
    401: "no valid token",
    403: "the token lacks the scope",
    404: "no such model or version",
    408: "the body did not arrive in time",
    413: "the body, or the answer, is too large",
    415: "the body is compressed, or not application/json",
    429: "overloaded, or the quota is used up; retry after the header `retry-after`",
    500: "internal error; the server's log has the request id",
    501: "the server was started without what this needs",
    503: "the model or the server does not serve now; retry after the header `retry-after`",
    504: "the deadline passed",
}


class Violation(msgspec.Struct):
    """One invalid field."""

    field: str
    description: str


class Problem(msgspec.Struct):
    """Problem details. Source: RFC 9457."""

    type: str
    status: int
    detail: str
    reason: str
    request_id: str
    metadata: dict[str, str] = {}
    violations: list[Violation] = []


class OpenaiFault(msgspec.Struct):
    """What is wrong, in OpenAI's form. `code` and `reason` are equal."""

    message: str
    type: str
    code: str
    reason: str
    request_id: str
    param: str | None = None


class OpenaiError(msgspec.Struct):
    """An error in OpenAI's form."""

    error: OpenaiFault


class RerankError(msgspec.Struct):
    """An error in the forms of TEI and Cohere together."""

    message: str
    error: str
    error_type: str
    reason: str
    request_id: str


class OipError(msgspec.Struct):
    """An error in the form of the Open Inference Protocol."""

    error: str
    reason: str
    request_id: str


def document_of(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """Return the OpenAPI document of endpoints."""
    listed = list(endpoints)
    kinds = {kind for one in listed for kind in (one.accepts, one.returns) if kind is not None}
    errors = {_error_of(one.path)[1] for one in listed}
    ordered = sorted(kinds | errors, key=repr)
    schemas, components = msgspec.json.schema_components(ordered, ref_template=_REFERENCE)
    schema_of = dict(zip(ordered, schemas, strict=True))
    paths: dict[str, Any] = {}
    for one in listed:
        paths.setdefault(one.path, {})[one.method.lower()] = _operation(one, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "attnserve",
            "version": __version__,
            "description": "Attention models over HTTP: inference with a selection of attention, embeddings as "
            "OpenAI's, reranking as TEI's and Cohere's, and the Open Inference Protocol, whose bodies may have bytes "
            "of tensors after the JSON: the header `inference-header-content-length` has its length then. Each "
            "answer has the header `x-request-id`.",
        },
        "paths": paths,
        "components": {
            "schemas": dict(sorted(components.items())),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def _operation(one: Endpoint, schema_of: dict[Any, Any]) -> dict[str, Any]:
    media_type, error = _error_of(one.path)
    content: dict[str, Any] = {"application/json": {"schema": schema_of[one.returns] if one.returns else {}}}
    content |= {kind: {"schema": {"type": "string"}} for kind in one.media_types}
    operation: dict[str, Any] = {
        "summary": one.summary,
        "operationId": re.sub(r"\W+", "_", f"{one.method.lower()}{one.path}").strip("_"),
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)}", one.path)
        ],
        "responses": {
            "200": {"description": "the answer", "content": content},
            **{
                str(status): {"description": meaning, "content": {media_type: {"schema": schema_of[error]}}}
                for status, meaning in _STATUSES.items()
            },
        },
    }
    if one.accepts is not None:
        body: dict[str, Any] = {"schema": schema_of[one.accepts]}
        if one.example is not None:
            body["example"] = one.example
        operation["requestBody"] = {"required": True, "content": {"application/json": body}}
    return operation


def _error_of(path: str) -> tuple[str, type]:
    """Return the media type and the type of the errors of a path, as `errors.response_of` makes them."""
    if path.endswith("rerank"):
        return "application/json", RerankError
    if path == "/v2" or path.startswith("/v2/"):
        return "application/json", OipError
    return ("application/json", OpenaiError) if is_openai(path) else ("application/problem+json", Problem)


def document_handler(endpoints: Sequence[Endpoint]) -> Handler:
    """Return what serves the document."""

    @cache
    def made() -> dict[str, Any]:
        return document_of(endpoints)

    async def document(_: Exchange) -> Response:
        return json_of(made())

    return document


def page_handler(endpoints: Sequence[Endpoint]) -> Handler:
    """Return what serves the page."""

    @cache
    def made() -> str:
        return page_of(document_of(endpoints))

    async def page(_: Exchange) -> Response:
        # The browser loads and runs nothing, also if a name held markup.
        policy = (
            "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return Response(made(), media_type="text/html", headers={"content-security-policy": policy})

    return page


_STYLE: Final = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "body{color:#1a1a1a;background:#fff}"
    "code,pre{font:14px/1.4 ui-monospace,monospace}pre{background:#f3f3f3;padding:.8rem;overflow:auto}"
    "table{border-collapse:collapse}td,th{border:1px solid #bbb;padding:.3rem .6rem;text-align:left;vertical-align:top}"
    "summary{cursor:pointer}"
)


def page_of(document: dict[str, Any]) -> str:
    """Return a document as HTML: each operation with a call by curl, and each schema with its fields."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>attnserve: HTTP API</title>',
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body><main>',
        f"<h1>attnserve {escape(document['info']['version'])}: HTTP API</h1>",
        f"<p>{escape(document['info']['description'])}</p>",
        '<p><a href="openapi.json">The OpenAPI document</a> has all of this for programs.</p><h2>Operations</h2>',
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h3><code>{method.upper()} {escape(path)}</code></h3><p>{escape(operation['summary'])}</p>")
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            if "$ref" in body.get("schema", {}):
                parts.append(f"<p>Body: {_type(body['schema'])}</p>")
            if "example" in body:
                sent = msgspec.json.format(msgspec.json.encode(body["example"])).decode()
                call = f"curl http://localhost:8000{path} -H 'content-type: application/json' -d '{sent}'"
                parts.append(f"<pre>{escape(call)}</pre>")
    parts.append("<h2>Types</h2>")
    for name, schema in document["components"]["schemas"].items():
        parts.append(f'<h3 id="{escape(name)}"><code>{escape(name)}</code></h3>')
        parts.append(
            f"<p>{escape(schema.get('description', ''))}</p><table><tr><th>Field</th><th>Type</th><th></th></tr>"
        )
        for field, kind in schema.get("properties", {}).items():
            needed = "required. " if field in schema.get("required", ()) else ""
            about = escape(needed + kind.get("description", ""))
            parts.append(f"<tr><td><code>{escape(field)}</code></td><td>{_type(kind)}</td><td>{about}</td></tr>")
        parts.append("</table>")
    return "".join([*parts, "</main></body></html>"])


def _type(schema: dict[str, Any]) -> str:
    """Return a schema in short, as HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#{name}">{name}</a>'
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(_type(one) for one in schema[union])
    if "enum" in schema:
        return ", ".join(escape(repr(one)) for one in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return escape(str(schema.get("type", "any")))
