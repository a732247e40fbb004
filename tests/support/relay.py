"""A TCP relay between a client and a server on loopback, which lists connections and cuts them.

For tests of what a client does when a connection goes away, while the server lives. Event loop only.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self


class Relay:
    """Passes connections to `port` on. `async with` listens, on a port that the system chose."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._stack = AsyncExitStack()
        self.port = 0
        self.open: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []
        """The connections that are open, oldest first: to the client and to the server."""
        self.frozen = False

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def cut(self, place: int = 0) -> None:
        """Reset a connection in both directions, as a machine does that has lost its state."""
        for writer in self.open[place]:
            writer.transport.abort()

    def freeze(self) -> None:
        """Forward nothing from now on, and close nothing, as a network that drops every packet."""
        self.frozen = True

    async def __aenter__(self) -> Self:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._stack.callback(server.close)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()
        while self.open:
            self.cut()
            await asyncio.sleep(0.01)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._server_port)
        pair = writer, back
        self.open.append(pair)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(reader, back))
                group.create_task(self._pass_on(there, writer))
        finally:
            self.open.remove(pair)
            for each in pair:
                each.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass bytes on until either end closes, which ends the other one too."""
        try:
            while data := await reader.read(1 << 16):
                if self.frozen:
                    continue
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()
