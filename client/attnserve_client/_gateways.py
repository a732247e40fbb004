"""What a client that routes requests, or tokenizes itself, gets of a server: the load of models, and tokenizers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from attnserve.v1 import inference_service_pb2 as wire

from attnserve_client._models import STATES
from attnserve_client._status import bad_answer

MOST_STARTS: Final = 3
"""Attempts to read a tokenizer file whose model is replaced meanwhile."""


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """What waits and runs of one model now; all numbers are 0 unless its state is `ready`.

    Attributes:
        model: Name of the model.
        version: Its version.
        state: `ready`, `loading`, `draining`, `failed` or `unknown`.
        waiting_sequences: Sequences that wait for a run.
        waiting_tokens: Positions of these that carry data.
        waiting_bytes: Bytes of these and of their answers.
        running_tokens: Positions that carry data in the runs in progress.
        instances: Most runs at the same time.
        predicted_wait_s: Predicted time in the queue of a request that arrives now, behind all others, in seconds; None
            while no speed is known.
        max_waiting_sequences: Most sequences that may wait; a request beyond them is refused.
    """

    model: str
    version: str
    state: str
    waiting_sequences: int
    waiting_tokens: int
    waiting_bytes: int
    running_tokens: int
    instances: int
    predicted_wait_s: float | None
    max_waiting_sequences: int


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """The tokenizer of a model, and what the server sets beside its file.

    Attributes:
        model: Name of the model.
        version: The version whose tokenizer it is.
        digest: `sha256:` and the hexadecimal digest of `content`, which the client has compared.
        content: The content of a `tokenizer.json`, for `tokenizers.Tokenizer.from_buffer`.
        max_tokens: Most tokens of a text, special tokens included.
        pads_and_truncates: Whether the padding and truncation of the file apply. If not, the server does neither.
        mask_token: The only special token that a text may spell; empty for none.
        pair_is_separate: Whether a second text is tokenized apart from the first, along another axis.
        pair_max_tokens: Most tokens of such a second text; 0 without one.
        pair_start_id: Id of the token before such a second text; None for none.
    """

    model: str
    version: str
    digest: str
    content: bytes
    max_tokens: int
    pads_and_truncates: bool
    mask_token: str
    pair_is_separate: bool
    pair_max_tokens: int
    pair_start_id: int | None


class Pieces:
    """Joins the pieces of a tokenizer file, and begins again if the model was replaced between two of them."""

    def __init__(self) -> None:
        self._first = wire.GetTokenizerResponse()
        self._joined = bytearray()
        self._starts = 0

    @property
    def offset(self) -> int:
        """Byte of the file that the next piece begins with."""
        return len(self._joined)

    def add(self, piece: wire.GetTokenizerResponse) -> TokenizerFile | None:
        """Add the next piece. Return the file if it is complete.

        Raises:
            BadAnswer: The pieces are not those of a file with their digest, or the model is replaced all the time.
        """
        if not self._starts or piece.digest != self._first.digest:
            self._starts += 1
            if self._starts > MOST_STARTS:
                raise bad_answer("the model was replaced while its tokenizer was read; call again")
            complete_again = piece.offset == 0
            self._first, self._joined = piece, bytearray()
            if not complete_again:
                return None
        if piece.offset != self.offset or (not piece.data and self.offset < piece.total_bytes):
            raise bad_answer(f"a piece of {len(piece.data)} bytes at {piece.offset} was not expected at {self.offset}")
        self._joined += piece.data
        if self.offset < piece.total_bytes:
            return None
        content = bytes(self._joined)
        if piece.digest != f"sha256:{hashlib.sha256(content).hexdigest()}":
            raise bad_answer("the tokenizer file does not have its digest")
        return _file_of(piece, content)


def load_of(message: wire.ModelLoad) -> ModelLoad:
    """Decode the load of one model."""
    known = message.HasField("predicted_wait_seconds")
    return ModelLoad(
        model=message.model,
        version=message.version,
        state=STATES.get(message.state, "unknown"),
        waiting_sequences=message.waiting_sequences,
        waiting_tokens=message.waiting_tokens,
        waiting_bytes=message.waiting_bytes,
        running_tokens=message.running_tokens,
        instances=message.instances,
        predicted_wait_s=message.predicted_wait_seconds if known else None,
        max_waiting_sequences=message.max_waiting_sequences,
    )


def _file_of(piece: wire.GetTokenizerResponse, content: bytes) -> TokenizerFile:
    settings = piece.settings
    return TokenizerFile(
        model=piece.model,
        version=piece.version,
        digest=piece.digest,
        content=content,
        max_tokens=settings.max_tokens,
        pads_and_truncates=settings.pads_and_truncates,
        mask_token=settings.mask_token,
        pair_is_separate=settings.pair_is_separate,
        pair_max_tokens=settings.pair_max_tokens,
        pair_start_id=settings.pair_start_id if settings.HasField("pair_start_id") else None,
    )
