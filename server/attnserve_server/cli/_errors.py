"""The error boundary of the commands: an exception becomes one sentence on standard error and an exit code.

typer's own exceptions pass, and so does that of a missing module of the server itself. With the environment variable
ATTNSERVE_TRACEBACK, internal errors pass too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console

from attnserve_server.domain.errors import AttnserveError

REFUSED = 2
"""Exit code of a failure that the user can fix: a wrong option, an unusable file, a missing package."""
INTERNAL_ERROR = 1
"""Exit code of an error in attnserve itself."""
EXIT_CODES = (
    "\n\nExit codes: 0, success; 1, internal error; 2, refused: one sentence on standard error states the reason, and "
    "nothing was written."
)
"""The end of a command's help text."""
TRACEBACK_VARIABLE = "ATTNSERVE_TRACEBACK"
"""Environment variable. If set, an internal error ends the command with its traceback instead of one sentence."""


@contextlib.contextmanager
def error_boundary() -> Iterator[None]:
    """Run the body of a command; print its failure as one sentence and raise `typer.Exit` with the exit code.

    Raises:
        typer.Exit: with `REFUSED` for an `AttnserveError`, a failed file operation, a missing package or exhausted
            memory; with `INTERNAL_ERROR` for any other exception; with its own code if the body raised it.
        typer.Abort: the body raised it.
        typer.BadParameter: the body raised it.
        ModuleNotFoundError: a module of the server itself is missing.
        Exception: any other exception as it is, if `TRACEBACK_VARIABLE` is set.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except AttnserveError as fault:
        _fail(str(fault), REFUSED)
    except OSError as fault:
        # The name of the file alone: its folders are the user's own.
        place = f"{Path(str(fault.filename)).name}: " if fault.filename else ""
        _fail(f"{place}{fault.strerror or fault}", REFUSED)
    except ModuleNotFoundError as fault:
        package = (fault.name or "").partition(".")[0]
        if package == "attnserve_server":
            raise
        _fail(f"{package} is not installed; run: pip install 'attnserve[convert,server]'", REFUSED)
    except MemoryError:
        _fail("the command needs more memory than this machine has", REFUSED)
    except Exception as fault:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        words = f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
        how = f"{TRACEBACK_VARIABLE}=1 prints the traceback"
        _fail(f"internal error: {words}; please report it ({how})", INTERNAL_ERROR)


def _fail(sentence: str, code: int) -> NoReturn:
    Console(stderr=True).print(f"error: {sentence}", style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(code) from None
