"""Reranking by a cross-encoder: `/rerank` as text-embeddings-inference and Cohere have it, and Cohere's two versions.

Each text is scored together with the query, as a pair. A score is the logistic function of the head's only output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec
from attnserve.v1 import inference_service_pb2
from msgspec import Meta
from starlette.responses import Response

from attnserve_server.domain.errors import InvalidRequest
from attnserve_server.model.manifest import Manifest
from attnserve_server.transport.rest.contract import checked
from attnserve_server.transport.rest.exchange import Exchange
from attnserve_server.transport.rest.native import json_of
from attnserve_server.transport.rest.openai import array_in, infer_all, models_with

MAX_TEXTS: Final = 2048


class Document(msgspec.Struct):
    """A text, as version 1 of Cohere's API also accepts it. Other fields are ignored."""

    text: str


class RerankBody(msgspec.Struct, forbid_unknown_fields=True):
    """A request to rank texts by their relevance to a query: `texts` as TEI, or `documents` as Cohere."""

    query: str
    texts: Annotated[list[str], Meta(max_length=MAX_TEXTS, description="TEI's field.")] | None = None
    documents: Annotated[list[str | Document], Meta(max_length=MAX_TEXTS, description="Cohere's field.")] | None = None
    model: Annotated[str | None, Meta(description="Left out: the only model that can rank.")] = None
    top_n: Annotated[int, Meta(ge=1)] | None = None
    return_documents: bool = False
    return_text: bool = False
    raw_scores: Annotated[bool, Meta(description="Return the head's output instead of a score from 0 to 1.")] = False
    truncate: Annotated[bool | None, Meta(description="Only false: nothing is truncated silently.")] = None
    timeout: Annotated[float, Meta(gt=0, description="Seconds until the request expires.")] | None = None


class Rank(msgspec.Struct, omit_defaults=True):
    """TEI's answer for one text: `index` is its place in the request."""

    index: int
    score: float
    text: str | None = None


class Relevance(msgspec.Struct, omit_defaults=True):
    """Cohere's answer for one document: `index` is its place in the request."""

    index: int
    relevance_score: float
    document: Document | None = None


class Relevances(msgspec.Struct):
    """Cohere's answer: documents by their relevance, greatest first."""

    id: str
    results: list[Relevance]
    meta: dict[str, Any]


def ranks(manifest: Manifest) -> bool:
    """Return whether a model is a cross-encoder: it takes text, and its head scores a sequence with one number."""
    head = manifest.head
    return manifest.text is not None and head is not None and head.kind == "sequence_labels" and len(head.labels) == 1


async def rerank(exchange: Exchange) -> Response:
    """Rank texts by their relevance to a query; `texts` get TEI's answer, and `documents` Cohere's."""
    sent = await exchange.json(RerankBody)
    if (sent.texts is None) is (sent.documents is None):
        raise InvalidRequest.of("texts", "neither, or both, of texts and documents; send one of them")
    order = await _order(exchange, sent, sent.texts if sent.texts is not None else _texts(sent.documents or ()))
    if sent.texts is None:
        return _as_cohere(exchange, sent, order)
    texts = sent.texts
    return json_of([Rank(at, score, texts[at] if sent.return_text else None) for score, at in order])


async def cohere_rerank(exchange: Exchange) -> Response:
    """Rank documents by their relevance to a query, as Cohere's API does."""
    sent = await exchange.json(CohereBody)
    return _as_cohere(exchange, sent, await _order(exchange, sent, _texts(sent.documents)))


class CohereBody(msgspec.Struct, forbid_unknown_fields=True):
    """A request to rank documents by their relevance to a query."""

    query: str
    documents: Annotated[list[str | Document], Meta(max_length=MAX_TEXTS)]
    model: Annotated[str | None, Meta(description="Left out: the only model that can rank.")] = None
    top_n: Annotated[int, Meta(ge=1)] | None = None
    return_documents: bool = False
    timeout: Annotated[float, Meta(gt=0, description="Seconds until the request expires.")] | None = None


def _as_cohere(exchange: Exchange, sent: RerankBody | CohereBody, order: list[tuple[float, int]]) -> Response:
    texts = _texts(sent.documents or ())
    results = [
        Relevance(at, score, Document(texts[at]) if sent.return_documents else None)
        for score, at in order[: sent.top_n]
    ]
    return json_of(Relevances(exchange.request_id, results, {"api_version": {"version": "2"}}))


def _texts(documents: Sequence[str | Document]) -> list[str]:
    return [one if isinstance(one, str) else one.text for one in documents]


async def _order(exchange: Exchange, sent: RerankBody | CohereBody, texts: list[str]) -> list[tuple[float, int]]:
    """Return the score and the place of each text, greatest score first, of equal ones in the given order."""
    if not texts:
        raise InvalidRequest.of("texts", "no texts; send at least one")
    if isinstance(sent, RerankBody) and sent.truncate:
        raise InvalidRequest.of("truncate", "texts are not truncated silently: shorten them, and leave truncate out")
    model = _model(exchange, sent.model)
    manifest, intake = exchange.rest.plane.reading(model, "")
    if not ranks(manifest) or manifest.head is None:
        others = models_with(exchange.rest.catalog, ranks)
        why = f"{model!r} is no cross-encoder, whose head gives a pair of texts one score; models that are: {others}"
        raise InvalidRequest.of("model", why)
    query = checked(sent.query, "query")
    pairs = [
        inference_service_pb2.Sequence(text=inference_service_pb2.TextInput(text=query, text_pair=_given(text, at)))
        for at, text in enumerate(texts)
    ]
    due = exchange.deadline_s(sent.timeout)
    exchange.admit(len(pairs))
    most = intake.max_batch_size
    messages = [
        inference_service_pb2.InferRequest(
            model=model,
            sequences=pairs[start : start + most],
            outputs=inference_service_pb2.OutputSelection(names=[manifest.head.outputs[0]]),
            request_id=exchange.request_id,
        )
        for start in range(0, len(pairs), most)
    ]
    answers, _ = await infer_all(exchange, messages, due)
    raw = isinstance(sent, RerankBody) and sent.raw_scores
    found = [float(array_in(one.outputs[0]).reshape(-1)[0]) for answer in answers for one in answer.results]
    scores = found if raw else [_logistic(one) for one in found]
    # By the head's output, because scores of great outputs are equal.
    order = sorted(range(len(texts)), key=lambda at: (-found[at], at))
    return [(scores[at], at) for at in order]


def _given(text: str, at: int) -> str:
    if not text:
        raise InvalidRequest.of(f"texts[{at}]", "empty; send at least one character")
    return checked(text, f"texts[{at}]")


def _model(exchange: Exchange, name: str | None) -> str:
    if name is not None:
        return checked(name, "model")
    names = {one.name for one in exchange.rest.catalog.all() if one.manifest is not None and ranks(one.manifest)}
    if len(names) != 1:
        found = models_with(exchange.rest.catalog, ranks)
        raise InvalidRequest.of("model", f"missing: {len(names)} models can rank ({found}); name one of them")
    return names.pop()


def _logistic(x: float) -> float:
    """Return 1 / (1 + exp(-x)), without overflow."""
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))
