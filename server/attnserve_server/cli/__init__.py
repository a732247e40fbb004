"""Entry point of `attnserve-server`. Commands that run models from elsewhere run in a child process.

A model can end the process that runs it. In a child process, that too becomes one sentence and an exit code.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from types import FrameType

EXIT_REFUSED = 2
"""Exit code of a command that cannot be carried out, or whose model ended the child process."""
RUN_FOREIGN_MODELS = {"export", "prepare", "inspect", "check"}
"""Commands that read and run files of other makers."""
serves = False
"""Whether this process is a server, and nothing else."""
_CHILD = "from attnserve_server.cli import run_as_child; run_as_child()"
_IMPORTED_LATE = ("onnxruntime", "grpc_health", "msgspec")
"""Libraries of the extra `server` that commands import where they need them, or only in other processes."""
_MEMORY_SHARE = 0.9
"""Share of the machine's memory that a child may use, so that it cannot exhaust the machine."""


def main() -> None:
    """Run the command line. A known failure is one sentence on standard error, without a traceback."""
    if sys.argv[1:2] and sys.argv[1] in RUN_FOREIGN_MODELS:
        # -P: without it, modules in the working folder would be imported in place of installed ones.
        sys.exit(run_in_child([sys.executable, "-P", "-c", _CHILD, *sys.argv[1:]]))
    global serves  # noqa: PLW0603 - a process has one purpose
    if sys.argv[1:2] == ["serve"]:
        serves = True
        _end_on_signals()
    _run_command()


def run_in_child(command: Sequence[str]) -> int:
    """Run a command to its end, and remove its temporary files.

    SIGTERM and SIGHUP to this process are passed on. An interrupt from the terminal reaches the child by itself.

    Args:
        command: the program and its arguments.

    Returns:
        The command's exit code; 128 plus the signal's number if SIGINT, SIGTERM or SIGHUP ended it; `EXIT_REFUSED` if
        any other signal did, after one sentence on standard error.
    """
    scratch = tempfile.mkdtemp(prefix="attnserve-")
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        child = subprocess.Popen(command, env={**os.environ, "TMPDIR": scratch})  # noqa: S603 - our own interpreter

        def pass_on(number: int, _: FrameType | None) -> None:
            child.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            return _wait(child)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run_as_child() -> None:
    """Run the command line in this process, within a limit of memory."""
    limit_memory()
    _run_command()


def limit_memory() -> None:
    """Limit this process to 90 % of the machine's memory, if the system has such limits."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # noqa: PLC0415 - some systems do not have it

        limit = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _MEMORY_SHARE)
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))


def _end_on_signals() -> None:
    """Let signals end the process until the server takes them: it serves nothing yet, so it has nothing to drain.

    By default, the first process of a container ignores SIGTERM, and SIGHUP ends any process.
    """

    def end(_: int, __: FrameType | None) -> None:
        os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _wait(child: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            code = child.wait()
        except KeyboardInterrupt:
            continue  # the child gets it too, and ends by itself
        break
    if code >= 0:
        return code
    if -code in {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}:
        return 128 - code
    why = "ran out of memory, or was killed" if -code == signal.SIGKILL else f"ended by {signal.Signals(-code).name}"
    sys.stderr.write(f"error: the model ended the runtime's process: it {why}; no bundle was written\n")
    return EXIT_REFUSED


def _run_command() -> None:
    try:
        from attnserve_server.cli._app import app  # noqa: PLC0415 - the base install lacks its libraries
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("attnserve"):
            raise
        missing = error.name
    else:
        missing = next((name for name in _IMPORTED_LATE if find_spec(name) is None), None)
    if missing is not None:
        needs = f"attnserve-server needs {missing}: pip install 'attnserve[server]'"
        sys.exit(_refused(f"{needs} (with a GPU: 'attnserve[server-gpu]')"))
    from attnserve_server.domain.errors import AttnserveError  # noqa: PLC0415 - as above

    try:
        app(prog_name="attnserve-server")
    except AttnserveError as error:
        sys.exit(_refused(f"attnserve-server: {error}"))


def _refused(sentence: str) -> int:
    sys.stderr.write(f"{sentence}\n")
    return EXIT_REFUSED
