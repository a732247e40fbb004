"""What the supervisor waits for from its fronts: each answer by the number of its front and a name."""

from __future__ import annotations

import asyncio


class Acks:
    """Answers that are expected. Event loop only."""

    def __init__(self) -> None:
        self._expected: dict[tuple[int, str], asyncio.Future[None]] = {}
        self._closed = False

    def expect(self, front: int, what: str) -> asyncio.Future[None]:
        """Return a future that is done when a front has answered, or has ended."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.set_result(None)
        else:
            self._expected[front, what] = future
        return future

    def resolve(self, front: int, what: str) -> None:
        """Take an answer. One that is not expected has no effect."""
        future = self._expected.pop((front, what), None)
        if future is not None and not future.done():
            future.set_result(None)

    def forget(self, front: int) -> None:
        """Expect nothing more of a front that has ended."""
        for number, what in [one for one in self._expected if one[0] == front]:
            self.resolve(number, what)

    def close(self) -> None:
        """Expect nothing more of any front."""
        self._closed = True
        for number, what in tuple(self._expected):
            self.resolve(number, what)
