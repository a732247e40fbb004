"""The conversion commands of `attnserve-server`, called in this process."""

from __future__ import annotations

import typer
from attnserve_server.cli import convert, inspect
from typer.testing import CliRunner, Result


def conversion_app() -> typer.Typer:
    """Return an application with `export`, `prepare` and `inspect`."""
    app = typer.Typer()
    convert.register(app)
    inspect.register(app)
    return app


def call(app: typer.Typer, *arguments: object) -> Result:
    """Call a command in a terminal of 200 columns, which wraps no line that tests look for.

    An error of the command is not raised: the result holds the exit code, the output and the exception.
    """
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
