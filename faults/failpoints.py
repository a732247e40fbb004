"""`attnserve-server` with faults put in: `python -m faults.failpoints NAMES serve ...`, names separated by commas.

Each function of `FAILPOINTS` changes the server in its process before it starts. A server of several processes starts
its fronts and engines as they are, so these are for `--isolation none`.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from typing import Any


def leak() -> None:
    """Keep 64 KiB of memory for each request."""
    from attnserve_server.transport import servicer  # noqa: PLC0415 - only in the process of the server

    kept: list[bytes] = []
    receive = servicer.receive

    def receive_and_keep(kind: Any, data: bytes, *limit: float) -> Any:
        kept.append(len(kept).to_bytes(64, "big") * 1024)
        return receive(kind, data, *limit)

    servicer.receive = receive_and_keep


def unavailable() -> None:
    """Refuse every request to `tiny` as a server that drains does."""
    from attnserve_server.domain.errors import NotServing  # noqa: PLC0415
    from attnserve_server.transport.dataplane import DataPlane  # noqa: PLC0415

    prepare = DataPlane.prepare

    def refuse(self: Any, request: Any, received: Any) -> Any:
        if received.message.model == "tiny":
            raise NotServing("tiny", "draining", retry_delay_s=0.0)
        return prepare(self, request, received)

    DataPlane.prepare = refuse  # type: ignore[method-assign]


def batching_dies() -> None:
    """On SIGUSR1, end the batching task of `tiny`."""
    from attnserve_server.app import Application  # noqa: PLC0415

    start = Application.start

    async def start_and_listen(self: Application) -> None:
        await start(self)

        def end() -> None:
            scheduler = self.catalog.get("tiny", "").scheduler
            task = scheduler._task  # type: ignore[union-attr]
            assert task is not None
            task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, end)

    Application.start = start_and_listen  # type: ignore[method-assign]


FAILPOINTS: dict[str, Callable[[], None]] = {
    "leak": leak,
    "unavailable": unavailable,
    "batching-dies": batching_dies,
}


def main() -> None:
    """Entry point. Exit code 2 for an unknown name."""
    names = sys.argv.pop(1).split(",")
    if unknown := set(names) - FAILPOINTS.keys():
        sys.exit(f"no failpoint {', '.join(sorted(unknown))}; there are {', '.join(FAILPOINTS)}")
    for name in names:
        FAILPOINTS[name]()
    from attnserve_server.cli import main as serve  # noqa: PLC0415

    sys.argv[0] = "attnserve-server"
    serve()


if __name__ == "__main__":
    main()
