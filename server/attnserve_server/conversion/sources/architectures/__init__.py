"""Families of Hugging Face architectures: how to call their models, and where their outputs and weights are."""

from __future__ import annotations

from typing import Any

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.sources.architectures.base import Family, InputTensor
from attnserve_server.conversion.sources.architectures.encoder_decoder import EncoderDecoder, Speech
from attnserve_server.conversion.sources.architectures.heads import Head, head_of
from attnserve_server.conversion.sources.architectures.image import Image, ImageText
from attnserve_server.conversion.sources.architectures.longformer import Longformer
from attnserve_server.conversion.sources.architectures.swin import Swin
from attnserve_server.conversion.sources.architectures.text import Text
from attnserve_server.conversion.sources.sentence_transformers import Modules

__all__ = ["Family", "Head", "InputTensor", "family_of", "head_of", "keeps_head"]

_BY_MODEL_TYPE: dict[str, type[Family]] = {"longformer": Longformer, "swin": Swin}
"""Models that need a separate class, by the model type of their configuration."""
_BY_MAIN_INPUT: dict[str, type[Family]] = {"pixel_values": Image, "input_features": Speech}
"""All other models, by the name of their main input. Models of text are not listed."""


def family_of(source: Any, modules: Modules | None = None, head: Head | None = None) -> Family:
    """Return the family of a loaded model.

    Args:
        source: the transformers model.
        modules: what makes the output `embedding`; None: no such output.
        head: the head that the model was loaded with; None: the model has no head, or it is left out.

    Raises:
        BuildRefused: `modules` are given for a model that does not encode one text.
    """
    family = _family_of(source)
    if issubclass(family, Text):
        return family(source, modules, head)
    if modules is not None:
        remedy = "add --no-head" if modules.own else f"remove --pooling {modules.modes[0]}"
        raise BuildRefused(f"{type(source).__name__} does not encode one text: {remedy}")
    return family(source)


def keeps_head(source: Any, head: Head) -> bool:
    """Return whether the family of a loaded model serves this head."""
    family = _family_of(source)
    return issubclass(family, Text) and head.kind in family.HEADS


def _family_of(source: Any) -> type[Family]:
    config = source.config
    if config.model_type in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[config.model_type]
    if hasattr(config, "vision_config") and hasattr(config, "text_config"):
        return ImageText
    if source.main_input_name in _BY_MAIN_INPUT:
        return _BY_MAIN_INPUT[source.main_input_name]
    return EncoderDecoder if getattr(config, "is_encoder_decoder", False) else Text
