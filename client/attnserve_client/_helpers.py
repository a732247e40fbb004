"""Which models embed texts and which score pairs, and the ranking of texts by their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attnserve_client._models import ModelInfo
from attnserve_client._specs import TensorSpec
from attnserve_client.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Ranked:
    """One text of a ranking.

    Attributes:
        index: Its index among the texts that were ranked.
        score: Its relevance to the query; the greater, the more relevant.
        text: The text.
    """

    index: int
    score: float
    text: str


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """The output that holds embeddings: its name, element type, and sizes (0 for a dynamic one)."""

    name: str
    dtype: str
    sizes: tuple[int, ...]


def embeds(model: ModelInfo) -> bool:
    """Return whether a model takes text and has an embedding output."""
    return model.accepts_text and _embedding_of(model) is not None


def ranks(model: ModelInfo) -> bool:
    """Return whether a model gives a pair of texts one score: a cross-encoder."""
    head = model.head
    return model.accepts_text and head is not None and head.kind == "sequence_labels" and len(head.labels) == 1


def named_output(model: ModelInfo) -> EmbeddingOutput:
    """Return the embedding output of a model that has one."""
    found = _embedding_of(model)
    assert found is not None, "the model was chosen by it"
    sizes = tuple(size if isinstance(size, int) else 0 for size in found.shape)
    return EmbeddingOutput(found.name, found.dtype, sizes)


def only_model(models: Sequence[ModelInfo], does: str, fits: Callable[[ModelInfo], bool]) -> ModelInfo:
    """Return the only model that fits: of the models of a server, or of the one that the caller named.

    Versions of one name count once, and the highest that is ready is returned.

    Args:
        models: To choose from, by name and ascending version.
        does: What the model is needed for, for the error.
        fits: Whether a model does so.

    Raises:
        InvalidRequest: No model fits, or models of several names do.
    """
    found = {model.name: model for model in models if fits(model) and (model.ready or len(models) == 1)}
    if len(found) == 1:
        (only,) = found.values()
        return only
    if found:
        names = ", ".join(found)
        raise InvalidRequest.of("model", f"{len(found)} models could be meant, {names}: name one")
    names = ", ".join(sorted({model.name for model in models})) or "none"
    raise InvalidRequest.of("model", f"no ready model {does}; known: {names}")


def ranked(texts: Sequence[str], scores: Sequence[float], top_n: int | None) -> list[Ranked]:
    """Return the texts by descending score; equal scores in the order of the texts."""
    order = sorted(range(len(texts)), key=lambda index: -scores[index])
    return [Ranked(index, scores[index], texts[index]) for index in order[:top_n]]


def _embedding_of(model: ModelInfo) -> TensorSpec | None:
    """Return the output `embedding`, else the only float output without a dynamic axis; None if there is none."""
    plain = [
        spec
        for spec in model.outputs
        if len(spec.shape) == 1 and isinstance(spec.shape[0], int) and spec.dtype.startswith("float")
    ]
    by_name = [spec for spec in plain if spec.name == "embedding"]
    head = () if model.head is None else model.head.outputs
    others = [spec for spec in plain if spec.name not in head and not spec.on_request]
    found = by_name or others
    return found[0] if len(found) == 1 else None
