"""OpenAI's `POST /v1/embeddings`, for models with an embedding output.

Up to 2,048 inputs are split into requests of the model's size, which run together. Base64 holds the output's own bytes.
Source: OpenAI's API reference, "Create embeddings".
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Coroutine, Sequence
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
import numpy as np
from attnserve.v1 import inference_service_pb2, tensor_pb2
from msgspec import Meta
from starlette.responses import Response

from attnserve_server.domain.errors import InvalidRequest
from attnserve_server.domain.values import Array
from attnserve_server.model import heads
from attnserve_server.model.manifest import NUMPY_DTYPES, InputRole, Manifest
from attnserve_server.scheduling.catalog import Catalog
from attnserve_server.transport.prepared import Prepared
from attnserve_server.transport.rest.contract import checked
from attnserve_server.transport.rest.exchange import Exchange
from attnserve_server.transport.rest.native import json_of
from attnserve_server.transport.wire import DTYPE_NAMES, WIRE_DTYPES, WIRE_NUMPY, Received, array_of

T = TypeVar("T")

MAX_INPUTS: Final = 2048
"""Source: OpenAI's API reference."""
_Ids = list[Annotated[int, Meta(ge=0, le=2**31 - 1)]]


class EmbeddingsBody(msgspec.Struct, forbid_unknown_fields=True):
    """A request for embeddings. `prompt_name` and `timeout` are extensions of this server."""

    model: str
    input: Annotated[
        str | list[str | int | _Ids],
        Meta(description="A text, up to 2,048 texts, or with `--openai-token-ids` token ids, or lists of them."),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    user: str | None = None
    """Accepted, because clients send it, and not used."""
    prompt_name: str | None = None
    timeout: Annotated[float, Meta(gt=0, description="Seconds until the request expires.")] | None = None


class Embedding(msgspec.Struct):
    """One embedding: its numbers, or its little-endian float32 bytes as base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class Usage(msgspec.Struct):
    """Tokens of all inputs, special tokens and prompts included."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct):
    """All embeddings, in the order of the inputs."""

    data: list[Embedding]
    model: str
    usage: Usage
    object: Literal["list"] = "list"


def embedding_of(manifest: Manifest) -> str:
    """Return the name of a model's embedding output; empty if it has none."""
    spec = heads.embedding_of(manifest.outputs)
    return "" if spec is None else spec.name


def models_with(catalog: Catalog, has: Any) -> str:
    """Return the names of the models whose manifests `has` is true of, for a message."""
    names = sorted({one.name for one in catalog.all() if one.manifest is not None and has(one.manifest)})
    return ", ".join(names[:8]) or "none"


async def embeddings(exchange: Exchange) -> Response:
    """Compute embeddings of texts, as OpenAI's API does."""
    sent = await exchange.json(EmbeddingsBody)
    model = checked(sent.model, "model")
    manifest, intake = exchange.rest.plane.reading(model, "")
    output = embedding_of(manifest)
    if not output:
        others = models_with(exchange.rest.catalog, embedding_of)
        raise InvalidRequest.of("model", f"{model!r} has no embedding output; models that have one: {others}")
    size = _size(sent.dimensions, manifest, output)
    normalized = manifest.embedding is not None and manifest.embedding.normalized
    sequences = _sequences(sent.input, manifest, allowed=exchange.rest.settings.openai_token_ids)
    due = exchange.deadline_s(sent.timeout)
    exchange.admit(len(sequences))
    parts = []
    for start in range(0, len(sequences), intake.max_batch_size):
        message = inference_service_pb2.InferRequest(
            model=model,
            sequences=sequences[start : start + intake.max_batch_size],
            outputs=inference_service_pb2.OutputSelection(names=[output]),
            request_id=exchange.request_id,
        )
        if sent.prompt_name is not None:
            message.prompt_name = checked(sent.prompt_name, "prompt_name")
        parts.append(message)
    answers, tokens = await infer_all(exchange, parts, due)
    arrays = [found.outputs[0] for answer in answers for found in answer.results]
    data = [
        Embedding(at, _shown(one, sent.encoding_format, size, normalized=normalized)) for at, one in enumerate(arrays)
    ]
    return json_of(Embeddings(data, model, Usage(tokens, tokens)))


async def infer_all(
    exchange: Exchange, messages: Sequence[inference_service_pb2.InferRequest], due: float
) -> tuple[list[inference_service_pb2.InferResponse], int]:
    """Run several requests together: return their answers and the tokens of all. The first failure cancels the others.

    Raises:
        AttnserveError: As `Exchange.infer`; RequestCancelled if the client left.
    """
    tokens = 0

    def note(prepared: Prepared) -> None:
        nonlocal tokens
        tokens += sum(one.tokens for one in prepared.valid.sequences)

    runs = [exchange.infer(Received(one, one.ByteSize()), due, note=note) for one in messages]
    return await exchange.while_connected(together(runs)), tokens


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all, and return what they return. The first failure cancels the others, and is raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _sequences(
    given: str | list[str | int | list[int]], manifest: Manifest, *, allowed: bool
) -> list[inference_service_pb2.Sequence]:
    """Return the sequences of an input of any of OpenAI's four kinds."""
    items: list[Any] = [given] if isinstance(given, str) else given
    if items and isinstance(items[0], int):
        items = [items]
    if not 1 <= len(items) <= MAX_INPUTS:
        raise InvalidRequest.of("input", f"{len(items)} inputs; send 1 to {MAX_INPUTS}")
    kinds = {
        type(one) for one in (items[0] if isinstance(given, list) and given and isinstance(given[0], int) else items)
    }
    if len(kinds) != 1:
        raise InvalidRequest.of("input", "texts and token ids in one list; send one kind")
    if isinstance(items[0], str):
        return [
            inference_service_pb2.Sequence(text=inference_service_pb2.TextInput(text=checked(one, f"input[{at}]")))
            for at, one in enumerate(items)
        ]
    if not allowed:
        raise InvalidRequest.of(
            "input",
            "token ids, which come from the client's tokenizer and not from the model's: send texts "
            "(langchain-openai: check_embedding_ctx_length=False), or start the server with --openai-token-ids",
        )
    spec = manifest.input_of_role(InputRole.TOKEN_IDS)
    if spec is None:
        raise InvalidRequest.of("input", f"model {manifest.name!r} takes no token ids")
    return [_ids(one, spec.name, spec.dtype, f"input[{at}]") for at, one in enumerate(items)]


def _ids(ids: list[int], name: str, dtype: str, field: str) -> inference_service_pb2.Sequence:
    if not ids:
        raise InvalidRequest.of(field, "no token ids; send at least one")
    data = np.array(ids, WIRE_NUMPY[dtype]).tobytes()
    tensor = tensor_pb2.Tensor(name=name, dtype=WIRE_DTYPES[dtype], shape=[len(ids)], data=data)
    return inference_service_pb2.Sequence(tensors=inference_service_pb2.TensorInput(tensors=[tensor]))


def array_in(tensor: tensor_pb2.Tensor) -> Array:
    """Return a tensor of an answer as an array."""
    return array_of(tensor.data, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def _size(dimensions: int | None, manifest: Manifest, output: str) -> int:
    """Return the length of the embeddings of an answer. Raises InvalidRequest unless the model has that."""
    width = manifest.output(output).shape[0]
    assert isinstance(width, int), "an embedding has a fixed length"
    sizes = () if manifest.embedding is None else manifest.embedding.sizes
    if dimensions is not None and dimensions not in {width, *sizes}:
        if not sizes:
            only = f"is not {width}, the only size of {manifest.name!r}: leave dimensions out"
        else:
            only = f"is none of {', '.join(map(str, (*sizes, width)))}, the sizes of {manifest.name!r}"
        raise InvalidRequest.of("dimensions", f"{dimensions} {only}")
    return width if dimensions is None else dimensions


def _shown(tensor: tensor_pb2.Tensor, encoding: str, size: int, *, normalized: bool) -> list[float] | str:
    """Return an embedding, cut to its first `size` values, and scaled to length 1 again if the whole one has that."""
    array = array_in(tensor)
    data = tensor.data
    if size < array.size or tensor.dtype != tensor_pb2.DATA_TYPE_FLOAT32:
        cut = array[:size].astype(np.float64)
        length = float(np.linalg.norm(cut)) if normalized and size < array.size else 1.0
        data = (cut / (length or 1.0)).astype(WIRE_NUMPY["float32"]).tobytes()
    if encoding == "base64":
        return base64.b64encode(data).decode()
    numbers: list[float] = np.frombuffer(data, NUMPY_DTYPES["float32"].newbyteorder("<")).tolist()
    return numbers
