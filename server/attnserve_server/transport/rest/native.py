"""The native API as JSON: inference by text or tensors with a selection of attention, streams of events, and models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Annotated, Any, Final, Literal

import msgspec
from attnserve.v1 import attention_pb2, inference_service_pb2, labels_pb2, model_pb2
from msgspec import Meta
from starlette.responses import Response, StreamingResponse

from attnserve_server.domain.errors import InvalidRequest
from attnserve_server.model.manifest import InputSpec
from attnserve_server.transport.rest.contract import Encoding, checked, fill, plain_of, struct_of
from attnserve_server.transport.rest.errors import content_of
from attnserve_server.transport.rest.exchange import ANSWER_EXPANSION, Exchange
from attnserve_server.transport.rest.tensors import TensorIn, tensor_of
from attnserve_server.transport.servicer import UNLOGGED, log_failure
from attnserve_server.transport.wire import Received

MAX_SEQUENCES: Final = 4096
EVENTS: Final = "text/event-stream"
Selection: Any = struct_of(attention_pb2.AttentionSelection.DESCRIPTOR)
LabelSelection: Any = struct_of(labels_pb2.LabelSelection.DESCRIPTOR)
InferResponse: Any = struct_of(inference_service_pb2.InferResponse.DESCRIPTOR)
_PRIORITIES: Final = {
    "low": inference_service_pb2.PRIORITY_LOW,
    "normal": inference_service_pb2.PRIORITY_NORMAL,
    "high": inference_service_pb2.PRIORITY_HIGH,
}


class SequenceIn(msgspec.Struct, forbid_unknown_fields=True):
    """One sequence: a text, with arrays for inputs that are not made from text, or arrays alone."""

    text: str | None = None
    text_pair: str | None = None
    tensors: list[TensorIn] = []
    past_tokens: list[str] = []


class InferBody(msgspec.Struct, forbid_unknown_fields=True):
    """A request to run sequences. Fields mean the same as those of `InferRequest` in the gRPC contract."""

    sequences: Annotated[
        list[str | SequenceIn],
        Meta(min_length=1, max_length=MAX_SEQUENCES, description="The sequences; a string is a text."),
    ]
    outputs: Annotated[list[str], Meta(description="Names of outputs; left out: the model's own choice.")] | None = None
    attention: Selection | None = None
    labels: LabelSelection | None = None
    priority: Literal["low", "normal", "high"] = "normal"
    validate_only: bool = False
    prompt_name: str | None = None
    timeout: Annotated[float, Meta(gt=0, description="Seconds until the request expires.")] | None = None
    tensor_encoding: Annotated[
        Literal["values", "base64"], Meta(description="How tensors are written in the answer.")
    ] = "values"


class ModelEntry(msgspec.Struct):
    """A model, as OpenAI's clients list it, and its versions. `created`: seconds of the epoch."""

    id: str
    created: int
    versions: list[dict[str, str]]
    object: Literal["model"] = "model"
    owned_by: str = "attnserve"


class ModelList(msgspec.Struct):
    """All models."""

    data: list[ModelEntry]
    object: Literal["list"] = "list"


async def infer(exchange: Exchange) -> Response:
    """Run the sequences of one request, or stream an event for each as soon as it is ready."""
    sent = await exchange.json(InferBody)
    reference = exchange.request.path_params
    manifest, _ = exchange.rest.plane.reading(reference["name"], reference.get("version", ""))
    sequences = [_sequence(one, manifest.inputs, f"sequences[{place}]") for place, one in enumerate(sent.sequences)]
    message = _request(exchange, sent)
    due = exchange.deadline_s(sent.timeout)
    exchange.admit(len(sequences), attention=message.HasField("attention"))
    if EVENTS in exchange.request.headers.get("accept", ""):
        events = _events(exchange, message, sequences, sent.tensor_encoding, due)
        return StreamingResponse(events, media_type=EVENTS, headers={"cache-control": "no-store"})
    message.sequences.extend(sequences)
    answer = await exchange.while_connected(_run(exchange, message, due, sent.tensor_encoding))
    return json_of(plain_of(answer, sent.tensor_encoding))


async def _run(
    exchange: Exchange, message: inference_service_pb2.InferRequest, due: float, encoding: Encoding
) -> inference_service_pb2.InferResponse:
    expansion = 2 if encoding == "base64" else ANSWER_EXPANSION
    return await exchange.infer(Received(message, message.ByteSize()), due, expansion=expansion)


def json_of(content: object) -> Response:
    """Return an answer in JSON."""
    return Response(msgspec.json.encode(content), media_type="application/json")


def _request(exchange: Exchange, sent: InferBody) -> inference_service_pb2.InferRequest:
    """Return the request without its sequences."""
    reference = exchange.request.path_params
    message = inference_service_pb2.InferRequest(
        model=checked(reference["name"], "model"),
        version=checked(reference.get("version", ""), "version"),
        priority=_PRIORITIES[sent.priority],
        validate_only=sent.validate_only,
        request_id=exchange.request_id,
    )
    if sent.outputs is not None:
        names = [checked(name, "outputs") for name in sent.outputs]
        message.outputs.CopyFrom(inference_service_pb2.OutputSelection(names=names))
    if sent.prompt_name is not None:
        message.prompt_name = checked(sent.prompt_name, "prompt_name")
    for field in ("attention", "labels"):
        selection = getattr(sent, field)
        if selection is not None:
            getattr(message, field).SetInParent()
            fill(getattr(message, field), selection)
    return message


def _sequence(sent: str | SequenceIn, specs: Sequence[InputSpec], field: str) -> inference_service_pb2.Sequence:
    if isinstance(sent, str):
        sent = SequenceIn(text=sent)
    tensors = [tensor_of(one, specs, f"{field}.tensors[{at}]") for at, one in enumerate(sent.tensors)]
    past = [checked(text, f"{field}.past_tokens") for text in sent.past_tokens]
    if sent.text is None:
        if sent.text_pair is not None:
            raise InvalidRequest.of(f"{field}.text_pair", "a second text needs a first one: set text")
        given = inference_service_pb2.TensorInput(tensors=tensors)
        return inference_service_pb2.Sequence(tensors=given, past_tokens=past)
    texts = checked(sent.text, f"{field}.text"), checked(sent.text_pair or "", f"{field}.text_pair")
    text = inference_service_pb2.TextInput(text=texts[0], text_pair=texts[1], tensors=tensors)
    return inference_service_pb2.Sequence(text=text, past_tokens=past)


async def _events(
    exchange: Exchange,
    common: inference_service_pb2.InferRequest,
    sequences: Sequence[inference_service_pb2.Sequence],
    encoding: Encoding,
    due: float,
) -> AsyncIterator[bytes]:
    """Yield an event for each sequence, as soon as its answer or its failure is known, and one at the end."""
    slots = asyncio.Semaphore(exchange.rest.settings.max_stream_in_flight)

    async def one(place: int) -> tuple[Exchange, bytes]:
        async with slots:
            part = Exchange(exchange.request, exchange.rest, exchange.path, exchange.request_id)
            message = inference_service_pb2.InferRequest(sequences=[sequences[place]])
            message.MergeFrom(common)
            try:
                answer = plain_of(await _run(part, message, due, encoding), encoding)
                return part, _event("result", {"index": place, **answer})
            except Exception as error:  # noqa: BLE001 - the boundary of one sequence: others go on
                if not isinstance(error, UNLOGGED):
                    log_failure(error, exchange.request_id, exchange.path)
                content = content_of(error, exchange.request_id, exchange.request.url.path)
                return part, _event("error", {"index": place, **content})

    tasks = [asyncio.create_task(one(place)) for place in range(len(sequences))]
    try:
        for next_one in asyncio.as_completed(tasks):
            part, event = await next_one
            yield event
            part.release()
        yield _event("done", {"sequences": len(sequences)})
    finally:
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, tuple):
                ended[0].release()


def _event(name: str, content: object) -> bytes:
    """Write one event. Source: the HTML standard, server-sent events."""
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(content) + b"\n\n"


async def list_models(exchange: Exchange) -> Response:
    """List the models, each with its versions and their states."""
    entries: dict[str, ModelEntry] = {}
    for served in exchange.rest.catalog.all():
        entry = entries.setdefault(served.name, ModelEntry(served.name, 0, []))
        if served.manifest is not None:
            entry.created = max(entry.created, _seconds(served.manifest.provenance.created))
        entry.versions.append({"version": served.version, "state": served.state.value})
    return json_of(ModelList(list(entries.values())))


async def describe_model(exchange: Exchange) -> Response:
    """Describe one model, or one version: its inputs, outputs, axes, sites, limits and labels."""
    reference = exchange.request.path_params
    name, version = checked(reference["name"], "model"), checked(reference.get("version", ""), "version")
    model = exchange.rest.plane.model(name, version)
    manifest = exchange.rest.catalog.find(name, version).manifest
    created = 0 if manifest is None else _seconds(manifest.provenance.created)
    openai = {"id": model.name, "object": "model", "created": created, "owned_by": "attnserve"}
    return json_of({**openai, **plain_of(model, "values")})


ModelDetails: Any = msgspec.defstruct(
    "ModelDetails",
    [("id", str), ("object", Literal["model"]), ("created", int), ("owned_by", str)],
    bases=(struct_of(model_pb2.Model.DESCRIPTOR),),
    kw_only=True,
)
"""The description in the gRPC contract, in an entry of OpenAI's list."""


def _seconds(created: str) -> int:
    """Return a time of a manifest in seconds of the epoch; 0 if it is none."""
    try:
        return int(datetime.fromisoformat(created).timestamp())
    except ValueError:
        return 0
