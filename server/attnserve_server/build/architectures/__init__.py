"""Families of architectures: each knows how its models are called and what they answer. One small module each."""

from __future__ import annotations

from typing import Any

from attnserve_server.build.architectures.base import Family, InputTensor
from attnserve_server.build.architectures.text import Text
from attnserve_server.build.errors import BuildRefused

__all__ = ["Family", "InputTensor", "family_of"]


def family_of(source: Any, pooling: str = "", *, normalize: bool = False) -> Family:
    """The family of a loaded source.

    Raises:
        BuildRefused: no family knows it, or `pooling` was asked of one that has no single text.
    """
    if getattr(source.config, "is_encoder_decoder", False):
        raise BuildRefused(f"{type(source).__name__} is an encoder with a decoder, which cannot be exported yet")
    return Text(source, pooling, normalize=normalize)
