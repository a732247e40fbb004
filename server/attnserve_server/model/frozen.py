"""Building blocks of a manifest: the frozen base class, names, and element types.

A manifest describes one converted model. A value that does not fit its type raises pydantic's ValidationError.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
VERSION_PATTERN = r"^[1-9][0-9]{0,8}$"

BATCH = "batch"
"""Axis symbol of the batch, the first axis of every input and output."""

ModelName = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
ModelVersion = Annotated[str, StringConstraints(pattern=VERSION_PATTERN)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$")]
"""Name of a file in the manifest's folder: one path component, never `..`."""
Symbol = Annotated[str, StringConstraints(min_length=1)]
Dimension = Symbol | Annotated[int, Field(ge=1)]

NUMPY_DTYPES: dict[str, np.dtype[np.generic]] = {
    name: np.dtype(name) for name in ("bool", "uint8", "int8", "int32", "int64", "float16", "float32", "float64")
}
Dtype = Literal["bool", "uint8", "int8", "int32", "int64", "float16", "float32", "float64"]


def is_model_name(name: str) -> bool:
    """Whether `name` is a valid name of a model: one path component, never `..`."""
    return re.fullmatch(NAME_PATTERN, name) is not None


def is_model_version(version: str) -> bool:
    """Whether `version` is a positive decimal integer."""
    return re.fullmatch(VERSION_PATTERN, version) is not None


class Frozen(BaseModel):
    """Base of every part of a manifest. Immutable; unknown fields are an error."""

    # Padding of an additive mask may be infinite. As a string it is valid JSON and reads back unchanged.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
