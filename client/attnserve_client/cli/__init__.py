"""The command `attnserve`. It needs the extra `cli`; without it, it says so in one sentence."""

from __future__ import annotations

import sys

_MISSING = 2


def main() -> None:
    """Entry point of the command."""
    try:
        import rich  # noqa: F401, PLC0415 - an extra: looked for before anything that needs it is loaded
        import typer  # noqa: F401, PLC0415
    except ImportError as error:
        sys.stderr.write(f"attnserve needs {error.name}: pip install 'attnserve[cli]'\n")
        sys.exit(_MISSING)
    from attnserve_client.cli._app import app  # noqa: PLC0415 - it needs what was looked for above

    app()
