"""`attnserve-server serve`: its flags are the settings, one each, so that the two cannot drift apart."""

from __future__ import annotations

import asyncio
import inspect
from typing import Annotated, Any

import typer
import uvloop

from attnserve_server.app import Application
from attnserve_server.config import Settings, flag_of, variable_of
from attnserve_server.observability.logs import configure


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command(name="serve")(_command())


async def _serve(settings: Settings) -> int:
    # Built inside the loop: gRPC binds its objects to the loop that is running.
    return await Application(settings).run()


def _command() -> Any:
    """The command, with one string flag for each setting: pydantic reads them all, and tells all faults at once."""

    def serve(**flags: str | None) -> None:
        """Serve every model of a repository over gRPC, with metrics and readiness over HTTP."""
        settings = Settings.load(flags)
        configure(settings.log_level)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            raise typer.Exit(runner.run(_serve(settings)))

    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None,
                typer.Option(
                    flag_of(name),
                    help=f"{field.description} [{variable_of(name)}]",
                    metavar="VALUE",
                    show_default=False,
                ),
            ],
        )
        for name, field in Settings.model_fields.items()
    ]
    made: Any = serve
    made.__signature__ = inspect.Signature(parameters)
    made.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return made
