"""`attnserve-server`: its entry point. The commands are in modules of their own, and `_app` puts them together."""

from __future__ import annotations

import sys

from attnserve_server.cli.child import run_in_child

EXIT_REFUSED = 2
"""As for every command line that cannot be carried out."""
RUN_FOREIGN_MODELS = {"export", "prepare", "inspect", "check"}
"""Commands that read and run what somebody else made."""


def main() -> None:
    """Runs the command line. A failure that we know is told in one sentence on standard error, without a traceback."""
    if sys.argv[1:2] and sys.argv[1] in RUN_FOREIGN_MODELS:
        sys.exit(run_in_child(_main))
    _main()


def _main() -> None:
    try:
        from attnserve_server.cli._app import app  # noqa: PLC0415 - the base install has none of what it imports
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("attnserve"):
            raise
        # Whether a runtime for CPUs or for GPUs is wanted only the person knows.
        needs = f"attnserve-server needs {missing.name}: pip install 'attnserve[server]'"
        sys.exit(_refused(f"{needs} (with a GPU: 'attnserve[server-gpu]')"))
    from attnserve_server.domain.errors import AttnserveError  # noqa: PLC0415 - as above

    try:
        app()
    except AttnserveError as error:
        sys.exit(_refused(f"attnserve-server: {error}"))


def _refused(sentence: str) -> int:
    sys.stderr.write(f"{sentence}\n")
    return EXIT_REFUSED
