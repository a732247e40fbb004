"""What the supervisor and its processes exchange: the start, connections, states of models, metrics, and the end.

Each process has one link to the supervisor. A message of another kind raises msgspec.DecodeError. Descriptors travel
beside it, in packages (`isolation.descriptors`): `package` is the number of one.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from attnserve_server.access.guard import Material
from attnserve_server.transport.http import Page

ARENA_BYTES: Final = 64 * 2**20
"""Bytes of each arena: a front's requests to one engine, and the answers to it. Pages count once they are written."""


class FrontModel(msgspec.Struct, frozen=True):
    """A model that a front serves. Package: the arena for requests, and the engine's load."""

    name: str
    version: str
    package: int


class Broken(msgspec.Struct, frozen=True):
    """A model whose bundle cannot be read."""

    name: str
    version: str
    reason: str


class FrontStart(msgspec.Struct, tag=True):
    """Starts one of `fronts` fronts. `settings`: as JSON. Package: its pulse, and the quotas that all fronts share."""

    settings: bytes
    models: list[FrontModel]
    broken: list[Broken]
    material: Material
    package: int
    fronts: int


class EngineStart(msgspec.Struct, tag=True):
    """Starts the engine of one model. Package: its pulse, its load, and `SharedOccupancy` of all engines."""

    settings: bytes
    process: str
    """Its name in logs."""
    name: str
    version: str
    place: int
    """This engine's place in `SharedOccupancy`."""
    package: int
    suspects: dict[int, list[int]] = {}
    """Requests that were in a run when the engine before it ended, by the number of their front."""
    isolated: bool = False
    """Whether the shadow check of an engine before it ended batching."""


class Attach(msgspec.Struct, tag=True):
    """An engine serves one more front. Package: the link, the arena for requests, and that for answers."""

    front: int
    package: int


class Connect(msgspec.Struct, tag=True):
    """A front uses another engine. Package: the link, and the arena for answers.

    `suspects`: its requests that were in a run when the engine before ended.
    """

    name: str
    version: str
    package: int
    suspects: list[int] = []


class Culprit(msgspec.Struct, tag=True):
    """A front's request that ended an engine alone in its run."""

    name: str
    version: str
    number: int


class Changed(msgspec.Struct, tag=True):
    """A model has another state. From an engine to the supervisor, and from there to all fronts."""

    name: str
    version: str
    state: str
    reason: str = ""
    provider: str = ""
    precision: str = ""
    expected_s: float | None = None
    """While the engine is replaced: seconds to the next one. Requests wait for it."""
    load_s: float = 0.0
    """From an engine that is ready: how long it took to load the model, after its imports."""


class Listening(msgspec.Struct, tag=True):
    """A front takes connections on this port."""

    port: int


class PageRequest(msgspec.Struct, tag=True):
    """A front requests a page of the HTTP port, where REST has the same one. `path`, `accept`: as `Pages.page`."""

    number: int
    path: str
    accept: str


class PageAnswer(msgspec.Struct, tag=True):
    """The page of a `PageRequest`."""

    number: int
    page: Page


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
TO_CHILD: Final = msgspec.msgpack.Decoder(
    FrontStart | EngineStart | Attach | Connect | Culprit | Changed | Drain | Scrape | PageAnswer | Material
)
TO_SUPERVISOR: Final = msgspec.msgpack.Decoder(Changed | Listening | Scraped | PageRequest)
