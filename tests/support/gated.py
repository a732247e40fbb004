"""A stand-in for a model's scheduler that holds every request until the test releases it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from attnserve_server.domain.errors import AttnserveError, RequestCancelled
from attnserve_server.domain.values import PreparedSequence, Priority, RunFacts, SequenceResult
from attnserve_server.engine.session import RunHandle
from attnserve_server.model.manifest import Manifest
from attnserve_server.scheduling.admission import Demand, Load
from attnserve_server.scheduling.policy import Candidate
from attnserve_server.scheduling.queue import Entry, Request, Run


@dataclass(eq=False)
class Gate:
    """Holds requests in `waiting`; `withdrawn` counts those that were cancelled, which stay in the list.

    `deadlines` and `received_bytes` list those of each request. `is_open`: requests are answered at once, not held.
    """

    manifest: Manifest
    waiting: list[Request] = field(default_factory=list)
    deadlines: list[float | None] = field(default_factory=list)
    received_bytes: list[int] = field(default_factory=list)
    withdrawn: int = 0
    is_open: bool = False
    seconds_per_token: float | None = None
    full: AttnserveError | None = None
    """Refuses requests before they are prepared; `refused` counts them."""
    refused: int = 0

    def check_room(self, deadline: float | None, caller: str = "") -> None:
        """Raise `full`, if it is set."""
        del caller
        if self.full is not None:
            self.refused += 1
            raise self.full

    def load(self) -> Load:
        """Return what waits: each request as one sequence of one token and one byte."""
        waiting = len(self.waiting)
        return Load(Demand(waiting, waiting, waiting), 0, 1, self.seconds_per_token)

    def submit(
        self, request: Request, sequences: Sequence[PreparedSequence], priority: Priority
    ) -> asyncio.Future[list[SequenceResult]]:
        """Answer with zeros, once the request is released."""
        del priority
        self.deadlines.append(request.deadline_s)
        self.received_bytes.append(request.received_bytes)
        request.admit(0.0)
        request.entries = [
            Entry(request, index, index, sequence, Candidate(0.0, (1,)), 0) for index, sequence in enumerate(sequences)
        ]
        self.waiting.append(request)
        results = request.results
        results.add_done_callback(partial(self._ended, request))
        if self.is_open:
            self.release(-1)
        return results

    def _ended(self, request: Request, results: asyncio.Future[list[SequenceResult]]) -> None:
        if results.cancelled() or isinstance(results.exception(), RequestCancelled):
            request.fail(RequestCancelled())
            self.withdrawn += 1
        request.release()

    def release(self, at: int = 0, error: Exception | None = None) -> None:
        """Answer the request at this place of `waiting`, or fail it with an error. IndexError if there is none."""
        request = self.waiting.pop(at)
        if error is not None:
            request.fail(error)
            return
        for entry in request.entries:
            entry.start(Run(RunHandle(), 1, 1))
            entry.answer(self._zeros(entry.sequence))

    def open(self) -> None:
        """Answer all requests, now and from now on."""
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
    """Wait until a condition holds; raise TimeoutError after `timeout_s`, which only a broken run reaches."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - it waits for a server, which has no event for the test
            await asyncio.sleep(0.002)
