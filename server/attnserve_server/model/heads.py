"""The outputs that a task adds to hidden states: a head and how labels are made from it, and an embedding.

A manifest states it, and refuses one whose outputs do not have the shapes of its kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from attnserve_server.model.frozen import Frozen
from attnserve_server.model.specs import OutputSpec

HeadKind = Literal["sequence_labels", "token_labels", "spans", "masked_tokens"]
Activation = Literal["softmax", "sigmoid", "identity"]

EMBEDDINGS: Final = ("embedding", "sentence_embedding")
"""Names of outputs that are embeddings."""
DEFAULT_TOP_K: dict[HeadKind, int] = {"sequence_labels": 5, "token_labels": 1, "spans": 1, "masked_tokens": 5}
"""Labels for each sequence, token or masked position, and answers for each sequence, if a request names no number."""


class HeadSpec(Frozen):
    """A head whose outputs the server turns into labels.

    Args:
        kind: `sequence_labels` (scores of one label set for the whole sequence), `token_labels` (for each token),
            `spans` (start and end of an answer in the text), or `masked_tokens` (scores of the vocabulary for each
            position that holds `mask_id`).
        outputs: the outputs that hold the scores before the activation: two for `spans`, else one.
        labels: the labels in the order of the output's last axis; empty for `spans` and `masked_tokens`.
        activation: from scores to the scores of labels.
        top_k: number of labels if a request names none.
        mask_id: the id of a masked position; None except for `masked_tokens`.
    """

    kind: HeadKind
    outputs: tuple[str, ...]
    labels: tuple[str, ...] = ()
    activation: Activation = "softmax"
    top_k: Annotated[int, Field(ge=1)] = 5
    mask_id: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _parts_fit_the_kind(self) -> Self:
        wanted = 2 if self.kind == "spans" else 1
        if len(self.outputs) != wanted:
            raise ValueError(f"head: {self.kind} has {len(self.outputs)} outputs; it must have {wanted}")
        if bool(self.labels) is not (self.kind in {"sequence_labels", "token_labels"}):
            raise ValueError(f"head: {self.kind} has {len(self.labels)} labels")
        if (self.mask_id is not None) is not (self.kind == "masked_tokens"):
            raise ValueError(f"head: {self.kind} has mask_id {self.mask_id}; only masked_tokens has one")
        return self

    @property
    def axis_first(self) -> bool:
        """Whether the outputs have an entry for each token, along their first axis."""
        return self.kind != "sequence_labels"


class EmbeddingSpec(Frozen):
    """How the output `embedding` follows from the hidden states.

    Args:
        pooling: a description, such as `mean, normalized`.
        own: whether the files of a sentence-transformers folder state it, instead of an option of the conversion.
        similarity: the function that compares embeddings, such as `cosine`; empty if the source states none.
        normalized: whether its length is 1.
        sizes: numbers of its first values that are embeddings too, because the model was trained for them. Source:
            Kusupati et al. 2022, Matryoshka Representation Learning.
    """

    pooling: str
    own: bool = False
    similarity: str = ""
    normalized: bool = False
    sizes: tuple[Annotated[int, Field(ge=1)], ...] = ()


def embedding_of(outputs: Sequence[OutputSpec]) -> OutputSpec | None:
    """Return the output that is an embedding: of one axis of fixed length, with one of the names in `EMBEDDINGS`."""
    return next(
        (one for one in outputs if one.name in EMBEDDINGS and len(one.shape) == 1 and isinstance(one.shape[0], int)),
        None,
    )


def check_task(head: HeadSpec | None, embedding: EmbeddingSpec | None, outputs: Sequence[OutputSpec]) -> None:
    """Check a head, as `check_head`, and the sizes of an embedding.

    Args:
        head: the head; None without one.
        embedding: how the embedding is made; None without one.
        outputs: of the manifest.

    Raises:
        ValueError: They do not fit the outputs.
    """
    if head is not None:
        check_head(head, outputs)
    if embedding is not None and embedding.sizes:
        spec = embedding_of(outputs)
        if spec is None:
            raise ValueError("embedding: sizes without an output of that name")
        (width,) = spec.shape
        wrong = [size for size in embedding.sizes if not isinstance(width, int) or size >= width]
        if wrong:
            raise ValueError(f"embedding: size {wrong[0]} is not below {width}, the length of output {spec.name!r}")


def check_head(head: HeadSpec, outputs: Sequence[OutputSpec]) -> None:
    """Check that the outputs of a head exist, and have the shapes of its kind.

    Args:
        head: the head.
        outputs: of the manifest.

    Raises:
        ValueError: an output is missing, or has another shape or type.
    """
    known = {spec.name: spec for spec in outputs}
    for name in head.outputs:
        if name not in known:
            raise ValueError(f"head: there is no output {name}")
        spec = known[name]
        rank = {"sequence_labels": 1, "spans": 1}.get(head.kind, 2)
        if len(spec.shape) != rank or not spec.dtype.startswith("float"):
            raise ValueError(f"head: output {name} is {spec.dtype} {list(spec.shape)}; {head.kind} needs {rank} axes")
        if head.axis_first and not isinstance(spec.shape[0], str):
            raise ValueError(f"head: the first axis of output {name} must be that of the tokens")
        if head.labels and spec.shape[-1] != len(head.labels):
            raise ValueError(f"head: output {name} has {spec.shape[-1]} scores for {len(head.labels)} labels")
