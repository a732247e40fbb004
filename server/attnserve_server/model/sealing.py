"""Prepares a tokenizer for serving: no text becomes a special token, and padding and truncation are as configured.

A tokenizer that cannot truncate texts as its file declares raises TokenizerInvalid.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer, models

from attnserve_server.domain.errors import AttnserveError


class TokenizerInvalid(AttnserveError):
    """A tokenizer file cannot be used. The message holds no path."""

    reason = "TOKENIZER_INVALID"

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(f"the tokenizer cannot be loaded: {why}")

    def metadata(self) -> dict[str, str]:
        """The reason."""
        return {"why": self.why}


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Return id and name of every special token except the unknown token, which represents text."""
    tokens = {number: token for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if isinstance(tokenizer.model, models.Unigram):
        # For this model, the library exposes the unknown token in the serialized form only.
        tokens.pop(json.loads(tokenizer.to_str())["model"]["unk_id"], None)
    else:
        unknown = tokenizer.model.unk_token
        tokens = {number: token for number, token in tokens.items() if token.content != unknown}
    return {number: token.content for number, token in tokens.items()}


def spelling(tokenizer: Tokenizer, token: str) -> Tokenizer:
    """Return a copy of a tokenizer in which a special token is an ordinary one, so that a text can spell it.

    Args:
        tokenizer: from a file.
        token: such as `[MASK]`; one that the tokenizer does not have changes nothing.
    """
    state = json.loads(tokenizer.to_str())
    for added in state["added_tokens"]:
        if added["content"] == token:
            added["special"] = False
    return Tokenizer.from_str(json.dumps(state))


def sealed(tokenizer: Tokenizer, special: dict[int, str]) -> Tokenizer:
    """Return the tokenizer, set so that no text becomes a special token, without padding and truncation.

    `encode_special_tokens` stops the library from searching the text for special tokens. A model whose vocabulary holds
    them (Unigram and word-level models) may still build them from their letters. Those tokens get random names that
    cannot be guessed, with the same ids and scores.

    Args:
        tokenizer: modified in place.
        special: from `special_tokens`.
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
        _try_texts(tokenizer)
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
    _try_texts(renamed)
    return renamed


@contextlib.contextmanager
def failures_named() -> Iterator[None]:
    """Turn what the library raises for a file whose parts do not fit together into TokenizerInvalid."""
    try:
        yield
    except TokenizerInvalid:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        raise TokenizerInvalid(f"it cannot tokenize a text: {lines[0][:200]}") from error


def _try_texts(tokenizer: Tokenizer) -> None:
    """Tokenize a text and a pair of texts. Raise a panic of the library; at run time it would end more than a request.

    Other errors are left to the texts of requests: a tokenizer may have no token for this one.
    """
    for texts in (("a",), ("a", "a")):
        with contextlib.suppress(Exception):
            tokenizer.encode(*texts)


def sized(tokenizer: Tokenizer, padding: Mapping[str, Any] | None, truncation: Mapping[str, Any] | None) -> Tokenizer:
    """Return a copy of a sealed tokenizer that pads and truncates.

    Args:
        tokenizer: from `sealed`.
        padding: the file's padding; None: none.
        truncation: the file's truncation; None: none.

    Raises:
        TokenizerInvalid: the library cannot truncate texts to this length.
    """
    copy = Tokenizer.from_str(tokenizer.to_str())
    _set_plain(copy)
    if padding:
        copy.enable_padding(**padding)
    if not truncation:
        return copy
    try:
        # The stride concerns the pieces that are cut off, which are not used. With one, short lengths are an error.
        copy.enable_truncation(**{**truncation, "stride": 0})
    except ValueError as error:
        raise TokenizerInvalid(f"texts cannot be truncated to {truncation['max_length']} tokens: {error}") from error
    long = "a " * (int(truncation["max_length"]) + 8)
    try:
        copy.encode(long)
        copy.encode(long, long)
    except Exception:  # noqa: BLE001, S110 - a text that cannot be truncated: the request with such a text is refused
        pass
    except BaseException as panic:
        # A panic of the library is not an Exception. At run time it would end more than one request.
        if type(panic).__name__ != "PanicException":
            raise
        raise TokenizerInvalid(f"texts cannot be truncated to {truncation['max_length']} tokens") from None
    return copy


def _set_plain(tokenizer: Tokenizer) -> None:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
