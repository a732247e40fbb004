"""`attnserve-server token`: make a token and its line for the tokens file, check a file, revoke a token.

A token is printed once, by `new`, and is stored nowhere. A wrong argument or file ends a command with exit code 2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from attnserve_server.access.tokens import SCOPES, Token, TokensInvalid, made, new_secret, parse
from attnserve_server.cli._errors import EXIT_CODES, error_boundary
from attnserve_server.cli._options import AsJson
from attnserve_server.model.repository import write_atomically

_SOON_DAYS = 14
_OTHERS_MAY_WRITE = 0o022

app = typer.Typer(no_args_is_help=True, help="Make, check and revoke the bearer tokens of `serve --tokens-file`.")

TokensFile = Annotated[Path, typer.Argument(help="The tokens file.", metavar="FILE")]


def register(parent: typer.Typer) -> None:
    """Add the commands to the command line."""
    parent.add_typer(app, name="token")


@app.command(
    epilog="Examples:\n\n"
    "attnserve-server token new nightly --scopes infer --file tokens.txt\n\n"
    "attnserve-server token new dashboard --scopes infer,attention --rate 50 --burst 100 --expires 2027-06-30"
    + EXIT_CODES
)
def new(
    name: Annotated[str, typer.Argument(help="Who will hold it; logs and refusals name it.")],
    scopes: Annotated[str, typer.Option("--scopes", help=f"Some of {','.join(SCOPES)}, with commas.")] = "infer",
    rate: Annotated[
        str, typer.Option("--rate", help="Quota: sequences a second over a long time.", show_default="no quota")
    ] = "",
    burst: Annotated[
        str, typer.Option("--burst", help="Quota: sequences at once after a pause.", show_default="as --rate")
    ] = "",
    expires: Annotated[
        str, typer.Option("--expires", metavar="YYYY-MM-DD", help="Its last day, in UTC.", show_default="none")
    ] = "",
    file: Annotated[
        Path | None, typer.Option("--file", help="Add the line to this file, which is made if it does not exist.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a token. It is printed once: the file holds its digest only."""
    with error_boundary():
        given = {"scopes": scopes, "rate": rate, "burst": burst, "expires": expires}
        secret = new_secret()
        token = made(name, secret, **{key: value for key, value in given.items() if value})
        if file is not None:
            _add(file, token)
    if as_json:
        typer.echo(json.dumps({"token": secret, "line": token.line(), "name": token.name}))
        return
    typer.echo(secret)
    where = "add this line to the tokens file:" if file is None else f"added to {file.name}; a running server reads it:"
    typer.echo(f"{where}\n{token.line()}", err=True)


@app.command(epilog="Example:\n\nattnserve-server token check tokens.txt" + EXIT_CODES)
def check(file: TokensFile, as_json: AsJson = False) -> None:
    """Check a tokens file as `serve` does, and list its tokens. Warns of what expires soon, and of its rights."""
    with error_boundary():
        tokens = parse(file.read_bytes(), file.name)
        others = bool(file.stat().st_mode & _OTHERS_MAY_WRITE)
    today = datetime.now(UTC).date()  # noqa: TID251 - tokens expire by the calendar
    rows = [_Row.of(token, today) for token in tokens]
    if as_json:
        listed = [{"name": one.token.name, "scopes": one.token.scopes, "rate": one.token.rate or None,
                   "burst": one.token.burst or None, "expires": one.token.expires or None, "state": one.state}
                  for one in rows]  # fmt: skip
        typer.echo(json.dumps({"tokens": listed, "others_may_write": others}))
        return
    table = Table("name", "scopes", "quota", "expires", "state")
    for one in rows:
        quota = f"{one.token.rate:g}/s, {one.token.burst:g} at once" if one.token.rate else "none"
        table.add_row(one.token.name, ",".join(one.token.scopes), quota, one.token.expires or "never", one.state)
    Console(highlight=False).print(table)
    if others:
        typer.echo(
            f"warning: other users may write {file.name}, and so add tokens; run: chmod go-w {file.name}", err=True
        )


@app.command(epilog="Example:\n\nattnserve-server token revoke nightly --file tokens.txt" + EXIT_CODES)
def revoke(
    name: Annotated[str, typer.Argument(help="The token's name.")],
    file: Annotated[Path, typer.Option("--file", help="The tokens file.")],
) -> None:
    """Remove a token's line. A running server refuses it within two seconds, on open streams too."""
    with error_boundary():
        text = file.read_text(encoding="utf-8")
        tokens = parse(text.encode(), file.name)
        if all(token.name != name for token in tokens):
            raise TokensInvalid(file.name, [f"it has no token {name!r}; `attnserve-server token check` lists all"])
        if len(tokens) == 1:
            raise TokensInvalid(file.name, [f"{name!r} is its only token, and a server needs one; make another first"])
        kept = [line for line in text.splitlines() if line.split("#", 1)[0].split()[:1] != [name]]
        _write(file, "\n".join(kept) + "\n")
    typer.echo(f"revoked {name}")


@dataclass(frozen=True)
class _Row:
    token: Token
    state: str

    @classmethod
    def of(cls, token: Token, today: date) -> _Row:
        """Judge one token."""
        if token.expired(today):
            return cls(token, "expired")
        soon = bool(token.expires) and date.fromisoformat(token.expires) < today + timedelta(_SOON_DAYS)
        return cls(token, "expires soon" if soon else "valid")


def _add(file: Path, token: Token) -> None:
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    text += "" if text.endswith("\n") or not text else "\n"
    text += token.line() + "\n"
    parse(text.encode(), file.name)
    _write(file, text)


def _write(file: Path, text: str) -> None:
    """Replace the file in one step, so that a server never reads half of it; a new one is for its owner alone."""
    mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
    with write_atomically(file) as partial:
        partial.touch(mode=0o600)
        partial.write_text(text, encoding="utf-8")
        partial.chmod(mode)
