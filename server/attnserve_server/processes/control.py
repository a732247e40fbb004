"""What the supervisor and its processes exchange: the start, connections, models, their states, metrics, and the end.

Each process has one link to the supervisor. A message of another kind raises msgspec.DecodeError. Descriptors travel
beside it, in packages (`isolation.descriptors`): `package` is the number of one.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from attnserve_server.access.guard import Material
from attnserve_server.isolation.messages import Failed
from attnserve_server.transport.http import Page

ARENA_BYTES: Final = 64 * 2**20
"""Bytes of each arena: a front's requests to one engine, and the answers to it. Pages count once they are written."""


class FrontStart(msgspec.Struct, tag=True):
    """Starts one of `fronts` fronts, which listens at the first `Sync`. `settings`: as JSON.

    `bounds`: the fields of `ReceiveBounds`. Package: its pulse, the quotas that all fronts share, and with an
    `audit_key` the pipe of the audit log.
    """

    settings: bytes
    material: Material
    package: int
    fronts: int
    bounds: tuple[int, ...]
    audit_key: bytes = b""


class Add(msgspec.Struct, tag=True):
    """A front has one more model, which its first `Changed` shows in the place of the same version.

    `serial` names it from then on. `manifest`: under the server's batching policy, as JSON; empty: it is broken.
    `max_request_size`: as in `ServedModel`.
    """

    serial: int
    name: str
    version: str
    manifest: bytes = b""
    max_request_size: int = 0


class Equip(msgspec.Struct, tag=True):
    """An engine is started for a model. Package: the arena for requests, the engine's load, and its tokenizer if any.

    A front that cannot use it answers `Refused`.
    """

    serial: int
    package: int


class Removed(msgspec.Struct, tag=True):
    """A model takes no more requests. The front answers `Retired` once it has none left."""

    serial: int


class Sync(msgspec.Struct, tag=True):
    """A front answers `Synced`, with the same number, once it has done all that it was sent before."""

    number: int


class EngineStart(msgspec.Struct, tag=True):
    """Starts the engine of one model. Package: its pulse, its load, and `SharedOccupancy` of all engines."""

    settings: bytes
    process: str
    """Its name in logs."""
    place: int
    """This engine's place in `SharedOccupancy`."""
    package: int
    path: str
    """The folder of its bundle."""
    manifest: bytes
    """Of that, as stored, as JSON."""
    files: list[list[str]] = []
    """Names of the bundle's files, whose descriptors are in one package for each list: `packages`. None: it reads them
    in the folder."""
    packages: list[int] = []
    suspects: dict[int, list[int]] = {}
    """Requests that were in a run when the engine before it ended, by the number of their front."""
    isolated: bool = False
    """Whether the shadow check of an engine before it ended batching."""


class Attach(msgspec.Struct, tag=True):
    """An engine serves one more front. Package: the link, the arena for requests, and that for answers."""

    front: int
    package: int


class Connect(msgspec.Struct, tag=True):
    """A front uses another engine for a model. Package: the link, and the arena for answers.

    `suspects`: its requests that were in a run when the engine before ended.
    """

    serial: int
    package: int
    suspects: list[int] = []


class Culprit(msgspec.Struct, tag=True):
    """A front's request that ended an engine alone in its run."""

    serial: int
    number: int


class Changed(msgspec.Struct, tag=True):
    """A model of a front has another state."""

    serial: int
    state: str
    reason: str = ""
    provider: str = ""
    precision: str = ""
    expected_s: float | None = None
    """While the engine is replaced: seconds to the next one. Requests wait for it."""


class Loaded(msgspec.Struct, tag=True):
    """An engine is ready, or its model has failed. `load_s`: how long it took to load, after the imports."""

    state: str
    reason: str = ""
    provider: str = ""
    precision: str = ""
    load_s: float = 0.0


class Refused(msgspec.Struct, tag=True):
    """A front cannot serve a model, and why."""

    serial: int
    why: str


class Retired(msgspec.Struct, tag=True):
    """A front has no request of a model left that was removed."""

    serial: int


class Synced(msgspec.Struct, tag=True):
    """A front has done what it was sent before the `Sync` of this number."""

    number: int


class ChangeModels(msgspec.Struct, tag=True):
    """A caller of a front changes the models: load or unload one, or reload the repository."""

    number: int
    what: Literal["load", "unload", "reload"]
    name: str = ""
    version: str = ""


class Done(msgspec.Struct, tag=True):
    """What became of `ChangeModels` of this number: the version that was loaded, the changes of a reload, or an error.

    Each change: name, version, outcome, reason. `error`: as between engines and fronts.
    """

    number: int
    version: str = ""
    changes: list[tuple[str, str, str, str]] = []
    error: Failed | None = None


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
    FrontStart
    | EngineStart
    | Attach
    | Add
    | Equip
    | Connect
    | Culprit
    | Changed
    | Removed
    | Sync
    | Done
    | Drain
    | Scrape
    | PageAnswer
    | Material
)
TO_SUPERVISOR: Final = msgspec.msgpack.Decoder(
    Loaded | Listening | Scraped | Refused | Retired | Synced | ChangeModels | PageRequest
)
