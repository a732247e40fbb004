"""What the supervisor and its processes exchange: the start, states of models, metrics, and the end.

Each process has one link to the supervisor. A message of another kind raises msgspec.DecodeError. Descriptors are
inherited, so that their numbers are the same in parent and child.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from attnserve_server.access.guard import Material

ARENA_BYTES: Final = 64 * 2**20
"""Bytes of each arena: a front's requests to one engine, and the answers to it. Pages count once they are written."""


class Channel(msgspec.Struct, frozen=True):
    """The connection of one front and one engine, as descriptors."""

    link: int
    requests: int
    """Arena that the front writes."""
    answers: int
    """Arena that the engine writes."""
    board: int
    """The engine's load."""


class ModelChannel(msgspec.Struct, frozen=True):
    """A model that a front serves, and the connection to its engine."""

    name: str
    version: str
    channel: Channel


class Broken(msgspec.Struct, frozen=True):
    """A model whose bundle cannot be read."""

    name: str
    version: str
    reason: str


class FrontStart(msgspec.Struct, tag=True):
    """Starts a front. `settings`: as JSON; `buckets`: descriptor of the quotas, which all fronts share."""

    settings: bytes
    models: list[ModelChannel]
    broken: list[Broken]
    material: Material
    buckets: int


class EngineStart(msgspec.Struct, tag=True):
    """Starts the engine of one model."""

    settings: bytes
    name: str
    version: str
    board: int
    occupancy: int
    """Memory of `SharedOccupancy`, for all engines."""
    place: int
    """This engine's place in it."""
    fronts: list[Channel]


class Changed(msgspec.Struct, tag=True):
    """A model has another state. From an engine to the supervisor, and from there to all fronts."""

    name: str
    version: str
    state: str
    reason: str = ""
    provider: str = ""
    precision: str = ""


class Listening(msgspec.Struct, tag=True):
    """A front takes connections on this port."""

    port: int


class Drain(msgspec.Struct, tag=True):
    """Take no more requests, answer the pending ones, and end."""


class Scrape(msgspec.Struct, tag=True):
    """Requests the metrics of a process."""

    number: int


class Scraped(msgspec.Struct, tag=True):
    """The metrics of a process, from `Metrics.snapshot`."""

    number: int
    families: dict[str, list[Any]]


ENCODER: Final = msgspec.msgpack.Encoder()
TO_CHILD: Final = msgspec.msgpack.Decoder(FrontStart | EngineStart | Changed | Drain | Scrape | Material)
TO_SUPERVISOR: Final = msgspec.msgpack.Decoder(Changed | Listening | Scraped)
