"""Families of architectures: each knows how its models are called and what they answer. One small module each."""

from __future__ import annotations

from typing import Any

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.sources.architectures.audio import Speech
from attnserve_server.conversion.sources.architectures.base import Family, InputTensor
from attnserve_server.conversion.sources.architectures.encoder_decoder import EncoderDecoder
from attnserve_server.conversion.sources.architectures.image import Image
from attnserve_server.conversion.sources.architectures.image_text import ImageText
from attnserve_server.conversion.sources.architectures.longformer import Longformer
from attnserve_server.conversion.sources.architectures.swin import Swin
from attnserve_server.conversion.sources.architectures.text import Text

__all__ = ["Family", "InputTensor", "family_of"]

_BY_MODEL_TYPE: dict[str, type[Family]] = {"longformer": Longformer, "swin": Swin}
"""Of models that need a module of their own; all others go by what they take."""
_BY_MAIN_INPUT: dict[str, type[Family]] = {"pixel_values": Image, "input_features": Speech}


def family_of(source: Any, pooling: str = "", *, normalize: bool = False) -> Family:
    """The family of a loaded source.

    Raises:
        BuildRefused: `pooling` was asked of a model that has no single text.
    """
    family = _family_of(source)
    if issubclass(family, Text):
        return family(source, pooling, normalize=normalize)
    if pooling:
        raise BuildRefused(f"{type(source).__name__} has no single text whose mean could be taken")
    return family(source)


def _family_of(source: Any) -> type[Family]:
    config = source.config
    if config.model_type in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[config.model_type]
    if hasattr(config, "vision_config") and hasattr(config, "text_config"):
        return ImageText
    if source.main_input_name in _BY_MAIN_INPUT:
        return _BY_MAIN_INPUT[source.main_input_name]
    return EncoderDecoder if getattr(config, "is_encoder_decoder", False) else Text
