"""Bodies of the Open Inference Protocol over HTTP, as types: requests, answers, and what describes the server.

Source: the Open Inference Protocol, version 2, HTTP/REST. Answers with descriptions of models have the types of gRPC's.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from attnserve_server.transport.oip.messages import MAX_INPUTS
from attnserve_server.transport.oip.wanted import MAX_OUTPUTS

Parameters = dict[str, str | bool | int | float | None] | None
_Data = Annotated[
    msgspec.Raw | UnsetType,
    Meta(
        description="The elements, row by row: one flat list, or nested lists of the shape. Strings for BYTES.",
        extra_json_schema={"type": "array", "items": {}},
    ),
]


class InferInput(msgspec.Struct, forbid_unknown_fields=True):
    """One input. Its elements are `data`, or as bytes after the JSON: as many as the parameter `binary_data_size`."""

    name: str
    shape: list[Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]]
    datatype: str
    data: _Data = UNSET
    parameters: Parameters = None


class InferRequestedOutput(msgspec.Struct, forbid_unknown_fields=True):
    """One output. The parameter `binary_data`: whether it is answered as bytes after the JSON."""

    name: str
    parameters: Parameters = None


class InferBody(msgspec.Struct, forbid_unknown_fields=True):
    """A request to run the rows of a batch. The first dimension of each input is the batch."""

    inputs: Annotated[list[InferInput], Meta(max_length=MAX_INPUTS)]
    outputs: (
        Annotated[
            list[InferRequestedOutput], Meta(max_length=MAX_OUTPUTS, description="Left out: all but virtual ones.")
        ]
        | None
    ) = None
    id: str | None = None
    parameters: Parameters = None
    model_name: str | None = None
    """As in the path. kserve's client sends it."""
    model_version: str | None = None


class InferOutput(msgspec.Struct):
    """One output. `data`: its elements, row by row, unless they are bytes after the JSON."""

    name: str
    datatype: str
    shape: list[int]
    data: list[float | int | bool | str] | UnsetType = UNSET
    parameters: dict[str, int] | UnsetType = UNSET


class InferAnswer(msgspec.Struct):
    """The answer to a request. `parameters`: nanoseconds in the queue, in the run, for attention and for encoding."""

    model_name: str
    model_version: str
    outputs: list[InferOutput]
    id: str | UnsetType = UNSET
    parameters: dict[str, int] | UnsetType = UNSET


class Live(msgspec.Struct):
    """Whether the process answers."""

    live: bool


class Ready(msgspec.Struct):
    """That the server takes requests."""

    ready: bool


class ModelReady(msgspec.Struct):
    """That a model takes requests."""

    name: str
    ready: bool


class Entry(msgspec.Struct):
    """One version of a model. `reason`: why it is in its state; empty where none is needed."""

    name: str
    version: str
    state: str
    reason: str


class IndexBody(msgspec.Struct, forbid_unknown_fields=True):
    """Which models to list."""

    ready: bool = False


class ChangeBody(msgspec.Struct, forbid_unknown_fields=True):
    """Parameters of a load or an unload."""

    parameters: Parameters = None


class Changed(msgspec.Struct):
    """Nothing: the change is made."""
