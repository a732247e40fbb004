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
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.repository import Bundle
from attnserve_server.observability.logs import logger, pipes_of, serving

_log = logger(__name__)

LEAST_BYTES: Final = 2**30
"""Memory of a trial beside that for the files: the interpreter with the runtime takes 80 MB, runs take the rest."""
PER_FILE_BYTE: Final = 6
"""Copies of weights while they load: the file, the tensors, those in another precision, those packed for kernels."""
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
        limit_bytes = settings.load_memory_bytes or derived_limit(bundle.path)
        task = {
            "settings": settings.model_dump_json(),
            "path": str(bundle.path),
            "manifest": manifest.model_dump_json(),
            "limit_bytes": limit_bytes,
        }
        with pipes_of(f"trial {manifest.name}/{manifest.version}") as (log, native):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "attnserve_server.trial", str(log),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=native, pass_fds=(log,),
                start_new_session=True,
            )  # fmt: skip
        memory = _Memory(process, limit_bytes)
        watching = asyncio.create_task(memory.watch())
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
        why = _why(answer, process.returncode or 0, passed=memory.passed)
        if why == _OVER:
            remedy = "repair the bundle, or set --load-memory-bytes"
            raise TrialFailed(f"loading took more than {limit_bytes} bytes of memory; {remedy}")
        if why:
            raise TrialFailed(why)


def _may_use_gpu(settings: Settings) -> bool:
    """Return whether a GPU's driver may be loaded, which reserves far more memory than it writes."""
    return named(settings.provider) not in {CPU, OPENVINO} and Path("/dev/nvidiactl").exists()


class _Memory:
    """Ends a process whose memory passes a limit."""

    def __init__(self, process: asyncio.subprocess.Process, limit_bytes: int) -> None:
        self._process = process
        self._limit_bytes = limit_bytes
        self.passed = False

    async def watch(self) -> None:
        """Look until the limit is passed. Ends when it is cancelled."""
        status = Path(f"/proc/{self._process.pid}/status")
        while self._process.returncode is None:
            if own_bytes(status) > self._limit_bytes:
                self.passed = True
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                return
            await asyncio.sleep(_LOOK_EVERY_S)


def derived_limit(folder: Path) -> int:
    """Return the memory that the trial of a bundle may take, in bytes, by the size of its files and the machine's."""
    try:
        size = sum(file.stat().st_size for file in folder.iterdir())
    except OSError:
        size = 0  # the trial reports it
    wanted = LEAST_BYTES + PER_FILE_BYTE * size
    most = machine_bytes()
    return min(wanted, most) if most else wanted


def machine_bytes(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Return the memory of this machine, at most the limit of the control group; 0 if the system does not report it."""
    try:
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0
    with contextlib.suppress(OSError, ValueError):  # no control group, or `max`
        most = min(most, int(limit.read_text(encoding="ascii")))
    return most


def own_bytes(status: Path) -> int:
    """Return what a process has written to memory, without pages of files, which the system can take back; else 0.

    Source: proc_pid_status(5), RssAnon and RssShmem.
    """
    try:
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


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
            open_bundle(Bundle(Path(task["path"]), manifest), settings)
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
