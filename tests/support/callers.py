"""Either client behind the methods of the asyncio one, so that one test covers both against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from attnserve_client import AsyncClient, Client

THREADS = 64


class Caller:
    """Either client, with the methods of the asyncio one."""

    def __init__(self, kind: type[Client | AsyncClient], target: Any, **options: Any) -> None:
        self.client: Any = kind(target, **options)
        self._threads = ThreadPoolExecutor(THREADS) if kind is Client else None

    async def run(self, function: Callable[[], Any]) -> Any:
        if self._threads is None:
            return await function()
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        return await self.run(partial(getattr(self.client, method), *arguments, **options))

    async def infer(self, text: str = "the cat", **options: Any) -> Any:
        return await self.call("infer", "tiny", text, **options)

    async def stream(self, texts: list[str]) -> list[Any]:
        if self._threads is None:
            return [answer async for answer in self.client.stream("tiny", texts)]
        return await self.run(lambda: list(self.client.stream("tiny", texts)))

    def running(self) -> list[int]:
        """The calls and streams in progress on each connection, alternating over the addresses."""
        return [lane.turns for lane in self.client._connections.lanes._lanes]

    async def together(self, calls: int, **options: Any) -> list[Any]:
        """The outcomes of calls that run at the same time: results, and errors if `return_exceptions`."""
        failures = options.pop("return_exceptions", False)
        return await asyncio.gather(*(self.infer(**options) for _ in range(calls)), return_exceptions=failures)

    async def close(self) -> None:
        await self.call("close")
        if self._threads is not None:
            self._threads.shutdown()
