"""The trial of a bundle: it is loaded, and its golden answers are repeated, in a process that is thrown away.

What the runtime does with a bad file cannot be caught in the process that runs it: it may crash, hang or take all
memory. `Trials` starts `python -m attnserve_server.trial` for each bundle, several side by side, and ends it at its
limit of time or memory. A bundle that fails raises TrialFailed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Final

from attnserve_server.config import Settings
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.machine import cores
from attnserve_server.engine.providers import CPU, OPENVINO, ProviderUnavailable, named
from attnserve_server.load_limits import MemoryLimit, derived_limit, own_bytes
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.repository import Bundle
from attnserve_server.observability.logs import logger, pipes_of, serving

_log = logger(__name__)

_LOOK_EVERY_S: Final = 0.02
"""A process writes some 100 MB to fresh memory in that time."""
_SLACK_BYTES: Final = 256 * 2**20
"""What may be reserved beyond the limit: stacks of threads, and memory that is reserved and not written."""
_HELD_S: Final = 10.0
"""Seconds for which a trial keeps others waiting: one that hangs must not."""
_LOG_LEVEL: Final = "error"
"""The server logs all else when it loads the bundle itself."""
_KILLED_FIRST: Final = "1000"
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


class TrialFailed(AttnserveError):
    """A bundle could not be loaded in a separate process."""

    reason = "TRIAL_FAILED"

    def __init__(self, why: str) -> None:
        super().__init__(why)


class Trials:
    """Runs trials, as many side by side as there are cores, and one where there are GPUs. Event loop only."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._slots = asyncio.Semaphore(1 if _may_use_gpu(settings) else max(2, cores()))

    async def run(self, bundle: Bundle) -> None:
        """Try one bundle. Cancelling ends its process.

        Args:
            bundle: under the server's batching policy.

        Raises:
            TrialFailed: with what the load failed with, or the limit that it passed.
        """
        loop = asyncio.get_running_loop()
        await self._slots.acquire()
        freed = loop.call_later(_HELD_S, self._slots.release)
        try:
            await self._try(bundle)
        finally:
            if loop.time() < freed.when() and not freed.cancelled():
                freed.cancel()
                self._slots.release()

    async def _try(self, bundle: Bundle) -> None:
        settings, manifest = self._settings, bundle.manifest
        limit_bytes = settings.load_memory_bytes or derived_limit(bundle.files_bytes())
        task = {
            "settings": settings.model_dump_json(),
            "path": str(bundle.path),
            "descriptors": dict(bundle.descriptors),
            "manifest": manifest.model_dump_json(),
            "limit_bytes": limit_bytes,
        }
        with pipes_of(f"trial {manifest.name}/{manifest.version}") as (log, native):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "attnserve_server.trial", str(log),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=native,
                pass_fds=(log, *bundle.descriptors.values()), start_new_session=True,
            )  # fmt: skip
        watching = asyncio.create_task(_watch(process, limit_bytes))
        try:
            async with asyncio.timeout(settings.load_timeout_s):
                answer, _ = await process.communicate(json.dumps(task).encode())
        except TimeoutError:
            raise TrialFailed(
                f"loading did not end within {settings.load_timeout_s:g} s; repair the bundle, or set --load-timeout-s"
            ) from None
        finally:
            watching.cancel()
            if process.returncode is None:
                process.kill()
                await process.wait()
        passed = watching.done() and not watching.cancelled() and watching.result()
        why = _why(answer, process.returncode or 0, passed=passed)
        if why == _OVER:
            remedy = "repair the bundle, or set --load-memory-bytes"
            raise TrialFailed(f"loading took more than {limit_bytes} bytes of memory; {remedy}")
        if why:
            raise TrialFailed(why)


def _may_use_gpu(settings: Settings) -> bool:
    """Return whether a GPU's driver may be loaded, which reserves far more memory than it writes."""
    return named(settings.provider) not in {CPU, OPENVINO} and Path("/dev/nvidiactl").exists()


async def _watch(process: asyncio.subprocess.Process, limit_bytes: int) -> bool:
    """End a process whose memory passes a limit, and return whether that was so."""
    limit, clock = MemoryLimit(process.pid, limit_bytes, own_bytes, _LOOK_EVERY_S), asyncio.get_running_loop().time
    while process.returncode is None:
        if limit.look(clock()):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            return True
        await asyncio.sleep(limit.every_s)
    return False


_OVER: Final = "memory"


def _why(answer: bytes, code: int, *, passed: bool) -> str:
    """Return why a trial failed; empty if it passed. `passed`: it was ended for its memory."""
    if passed:
        return _OVER
    with contextlib.suppress(ValueError):
        return str(json.loads(answer))
    ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return f"the process that loaded it ended {ended}; the runtime cannot load this file, convert the model again"


def _main() -> None:
    """Try the bundle that standard input names, and write why it failed, as JSON; empty: it did not."""
    from attnserve_server import loading_failpoints  # noqa: PLC0415 - in this process only
    from attnserve_server.loading import open_bundle  # noqa: PLC0415 - the runtime, in this process only

    answer = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    task = json.loads(sys.stdin.buffer.read())
    manifest = Manifest.model_validate_json(task["manifest"])
    settings = Settings.model_validate_json(task["settings"])
    _confine(task["limit_bytes"], reserves=_may_use_gpu(settings))
    name = f"trial {manifest.name}/{manifest.version}"
    with serving(_LOG_LEVEL, name, int(sys.argv[1])):
        try:
            loading_failpoints.at_load(manifest.name, manifest.version)
            open_bundle(Bundle(Path(task["path"]), manifest, descriptors=task["descriptors"]), settings)
            why = ""
        except ProviderUnavailable:
            why = ""  # of the server, which refuses to start
        except Exception as error:  # noqa: BLE001 - the boundary of the trial
            why = _reason(error)
    os.write(answer, json.dumps(why).encode())
    os._exit(0)  # what was loaded need not be freed


def _confine(limit_bytes: int, *, reserves: bool) -> None:
    """Limit this process: it ends with its parent, first if memory runs out, and dumps nothing.

    Args:
        limit_bytes: of memory that it writes.
        reserves: whether it reserves far more than it writes.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_KILLED_FIRST, encoding="ascii")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not reserves:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = limit_bytes + _SLACK_BYTES
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _reason(error: BaseException) -> str:
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, MemoryError) or "bad_alloc" in str(found) or "BFCArena" in str(found):
            return _OVER
        found = found.__cause__
    if isinstance(error, AttnserveError):
        return str(error)
    _log.error("a trial failed", exc_info=error)
    return "internal error while loading; see the log"


if __name__ == "__main__":
    _main()
