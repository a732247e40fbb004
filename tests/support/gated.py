"""A stand-in for a model's scheduler that holds every request until the test lets it go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.values import PreparedSequence, Priority, RunFacts, SequenceResult
from attnserve_server.model.manifest import Manifest


@dataclass(eq=False)
class Gate:
    """Holds requests. `waiting` has one future for each; `withdrawn` counts those whose caller left."""

    manifest: Manifest
    waiting: list[asyncio.Future[None]] = field(default_factory=list)
    deadlines: list[float | None] = field(default_factory=list)
    received_bytes: list[int] = field(default_factory=list)
    withdrawn: int = 0
    is_open: bool = False
    full: AttnserveError | None = None
    """What it refuses requests with before they are prepared."""

    def check_room(self, deadline: float | None) -> None:
        """There is, unless the test says otherwise."""
        if self.full is not None:
            raise self.full

    async def submit(
        self,
        sequences: Sequence[PreparedSequence],
        *,
        deadline: float | None,
        priority: Priority,
        received_bytes: int,
        request_id: str = "",
    ) -> list[SequenceResult]:
        """Answers with zeros, once it is let go."""
        self.deadlines.append(deadline)
        self.received_bytes.append(received_bytes)
        if not self.is_open:
            held: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.waiting.append(held)
            try:
                await held
            except asyncio.CancelledError:
                self.withdrawn += 1
                raise
        return [self._zeros(sequence) for sequence in sequences]

    def release(self, at: int = 0, error: AttnserveError | Exception | None = None) -> None:
        """Lets one request go, with its answer or with an error."""
        held = self.waiting.pop(at)
        if error is None:
            held.set_result(None)
        else:
            held.set_exception(error)

    def open(self) -> None:
        """Lets all go, now and from now on."""
        self.is_open = True
        while self.waiting:
            self.release()

    def _zeros(self, sequence: PreparedSequence) -> SequenceResult:
        outputs = {}
        for name in sequence.outputs:
            shape = self.manifest.output(name).shape
            outputs[name] = np.zeros(
                [sequence.lengths[extent] if isinstance(extent, str) else extent for extent in shape], np.float32
            )
        return SequenceResult(outputs, None, RunFacts(1, sequence.tokens, sequence.tokens, 0.0, 0))


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Waits until a condition holds; fails after `timeout_s`, which only a broken run reaches."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - it waits for a server, which has no event for the test
            await asyncio.sleep(0.002)
