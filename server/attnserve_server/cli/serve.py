"""`attnserve-server serve` and `healthcheck`: run a server, and check whether a running one is ready.

The flags of `serve` are generated from the settings, one for each, so that the two cannot differ. An invalid
setting and a failed start end `serve` with one sentence and exit code 2.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import Annotated, Any, Final

import typer
import uvloop
from pydantic.fields import FieldInfo

from attnserve_server import cli
from attnserve_server.config import Settings, flag_of, variable_of
from attnserve_server.config_bounds import size_text
from attnserve_server.lifetime import AFTER_GRACE_S, TEARDOWN_S, HardEnd, run
from attnserve_server.observability import probe
from attnserve_server.observability.logs import END_S, serving

EXAMPLES: Final = (
    "Each flag is also a variable; a flag overrides it. Sizes take KiB, MiB and GiB.\n\n"
    "Examples:\n\n"
    "attnserve-server serve --repository models\n\n"
    "attnserve-server serve --models minilm --max-queue-bytes 256MiB --isolation process\n\n"
    "attnserve-server serve --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem --tokens-file tokens.txt\n\n"
    "ATTNSERVE_REPOSITORY=/models ATTNSERVE_INSTANCES=4 attnserve-server serve"
)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(name="serve", epilog=EXAMPLES)(_serve_command())
    app.command()(healthcheck)


def healthcheck(
    host: Annotated[
        str, typer.Option(envvar=probe.HOST_VARIABLE, help="Address that the server listens on.")
    ] = probe.DEFAULT_HOST,
    port: Annotated[
        int, typer.Option("--http-port", envvar=probe.PORT_VARIABLE, help="HTTP port of the server.")
    ] = probe.DEFAULT_PORT,
    tls_cert: Annotated[
        str, typer.Option(envvar=probe.TLS_VARIABLE, help="Set, as for `serve`, if the server uses TLS.")
    ] = "",
    timeout_s: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = probe.DEFAULT_TIMEOUT_S,
) -> None:
    """Check whether a running server is ready: exit code 0 if so, 1 if not."""
    reason = probe.why_not_ready(host, port, timeout_s, tls=bool(tls_cert))
    if reason:
        typer.echo(f"not ready: {reason}", err=True)
        raise typer.Exit(1)
    typer.echo("ready")


async def _serve(settings: Settings, hard: HardEnd) -> int:
    # gRPC binds its objects to the running loop, so the application is built inside it.
    if settings.isolated:
        from attnserve_server.processes.supervisor import Supervisor  # noqa: PLC0415 - without the runtime's memory

        return await run(Supervisor(settings), settings.drain_grace_s, hard)
    from attnserve_server.app import Application  # noqa: PLC0415 - imports the runtime

    return await run(Application(settings), settings.drain_grace_s, hard)


def _is_switch(field: FieldInfo) -> bool:
    """Return whether a setting is decided by the server unless its flag turns it on or off."""
    return field.annotation == bool | None


def _type_of(field: FieldInfo) -> Any:
    """Return what the flag of a setting takes: nothing where it turns something on, or off; else a text."""
    return bool | None if field.default is False or _is_switch(field) else str | None


def _option(name: str, field: FieldInfo) -> Any:
    """Return the flag of a setting, whose help has its variable and its default."""
    default = "none" if field.default in (None, (), {}, "") else str(field.default)
    if name.endswith("_bytes") and isinstance(field.default, int) and field.default:
        default = size_text(field.default)
    text = f"{field.description} [{variable_of(name)}, default {default}]"
    flag = f"{flag_of(name)}/--no-{flag_of(name)[2:]}" if _is_switch(field) else flag_of(name)
    return typer.Option(flag, help=text, metavar="VALUE", show_default=False)


def _serve_command() -> Any:
    """The command, with a string flag for each setting: pydantic parses them, and reports all faults together."""

    def serve(**flags: str | bool | None) -> None:
        """Serve every model of a repository over gRPC, with metrics and readiness over HTTP."""
        settings = Settings.load(flags)
        process = "supervisor" if settings.isolated else ""
        hard = HardEnd(armed=cli.serves)
        with serving(settings.log_level, process):
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                code = runner.run(_serve(settings, hard))
                # Python waits for threads that load a model, or run one, and some of these cannot be stopped.
                hard.within(TEARDOWN_S, code)
            hard.within(END_S + TEARDOWN_S, code)  # for a log that is not read
        hard.within(AFTER_GRACE_S, code)  # nothing is left but the interpreter
        raise typer.Exit(code)

    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_type_of(field), _option(name, field)],
        )
        for name, field in Settings.model_fields.items()
    ]
    made: Any = serve
    made.__signature__ = inspect.Signature(parameters)
    made.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return made
