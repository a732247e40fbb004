"""The command `attnserve`. Without the extra `cli`, it prints which extra to install and exits with code 2."""

from __future__ import annotations

import sys

_MISSING = 2


def main() -> None:
    """Run the command. Exit with code 2 if rich or typer is missing."""
    try:
        import rich  # noqa: F401, PLC0415 - an extra: checked before any module that imports it
        import typer  # noqa: F401, PLC0415
    except ImportError as error:
        sys.stderr.write(f"attnserve needs {error.name}: pip install 'attnserve[cli]'\n")
        sys.exit(_MISSING)
    from attnserve_client.cli._app import app  # noqa: PLC0415 - imports the extra checked above

    app()
