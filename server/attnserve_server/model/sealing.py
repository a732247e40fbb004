"""Tokenizers set for serving: no text becomes a special token, and nothing is cut or padded but as a file says."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, models

from attnserve_server.domain.errors import AttnserveError


class TokenizerInvalid(AttnserveError):
    """A tokenizer file cannot be used. The message never holds its path."""

    reason = "TOKENIZER_INVALID"

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(f"the tokenizer cannot be loaded: {why}")

    def metadata(self) -> dict[str, str]:
        """What was wrong."""
        return {"why": self.why}


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Ids and names of the tokens that mark structure: all special ones but the unknown token, which is text."""
    tokens = {number: token for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if isinstance(tokenizer.model, models.Unigram):
        # The library tells this one model's unknown token in its file only.
        tokens.pop(json.loads(tokenizer.to_str())["model"]["unk_id"], None)
    else:
        unknown = tokenizer.model.unk_token
        tokens = {number: token for number, token in tokens.items() if token.content != unknown}
    return {number: token.content for number, token in tokens.items()}


def sealed(tokenizer: Tokenizer, special: dict[int, str]) -> Tokenizer:
    """The tokenizer, set so that no text becomes a special token, and that nothing is cut or padded.

    `encode_special_tokens` keeps the library from looking for special tokens in the text. But a model whose own
    vocabulary holds them (Unigram and word-level ones do) may still put them together from their letters. There they
    get random names that cannot be guessed; ids and scores stay.
    """
    _set_plain(tokenizer)
    leaking = {
        number: content
        for number, content in special.items()
        if any(
            number in tokenizer.encode(probe, add_special_tokens=False).ids
            for probe in (content, f"a {content} b", f"a{content}b")
        )
    }
    if not leaking:
        return tokenizer
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for number, content in leaking.items():
        name = secrets.token_hex(16)
        if isinstance(vocabulary, list):
            vocabulary[number][0] = name
        else:
            vocabulary[name] = vocabulary.pop(content)
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] not in leaking]
    renamed = Tokenizer.from_str(json.dumps(state))
    _set_plain(renamed)
    return renamed


def sized(tokenizer: Tokenizer, padding: Mapping[str, Any] | None, truncation: Mapping[str, Any] | None) -> Tokenizer:
    """A copy of a sealed tokenizer that pads and cuts.

    Raises:
        TokenizerInvalid: the library fails on such a length.
    """
    copy = Tokenizer.from_str(tokenizer.to_str())
    _set_plain(copy)
    if padding:
        copy.enable_padding(**padding)
    if not truncation:
        return copy
    try:
        # The stride is of the pieces that are cut off, which are not used; with one the library fails on short lengths.
        copy.enable_truncation(**{**truncation, "stride": 0})
    except ValueError as error:
        raise TokenizerInvalid(f"texts cannot be cut to {truncation['max_length']} tokens: {error}") from error
    long = "a " * (int(truncation["max_length"]) + 8)
    try:
        copy.encode(long)
        copy.encode(long, long)
    except Exception:  # noqa: BLE001, S110 - a text that cannot be cut: each such is refused when it comes
        pass
    except BaseException as panic:
        # The library's own failures are no exceptions; at run time one would end more than a request.
        if type(panic).__name__ != "PanicException":
            raise
        raise TokenizerInvalid(f"texts cannot be cut to {truncation['max_length']} tokens") from None
    return copy


def _set_plain(tokenizer: Tokenizer) -> None:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
