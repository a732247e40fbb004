"""Failures of the command: one sentence on stderr, and an exit code for each remedy."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import typer

from attnserve_client._async.waiting import NOT_READY
from attnserve_client.cli._text import clean
from attnserve_client.errors import (
    AttentionUnavailable,
    AttnserveError,
    BadAnswer,
    DeadlineExpired,
    InternalFault,
    InvalidRequest,
    ModelFailed,
    ModelNotFound,
    NotServing,
    Overloaded,
    PermissionDenied,
    RepositoryUnusable,
    RequestCancelled,
    ResponseTooLarge,
    ServerUnreachable,
    TextUnavailable,
    Unauthenticated,
    Unsupported,
)

# The first matching class decides. typer itself exits with 2 on a wrong command line.
EXIT_CODES: Final[tuple[tuple[type[AttnserveError], int], ...]] = (
    (InvalidRequest, 3),
    (ModelNotFound, 4),
    (AttentionUnavailable, 5),
    (TextUnavailable, 5),
    (ResponseTooLarge, 6),
    (Overloaded, 7),
    (NotServing, 8),
    (ModelFailed, 8),
    (RepositoryUnusable, 8),
    (Unsupported, 5),
    (DeadlineExpired, 9),
    (InternalFault, 10),
    (BadAnswer, 10),
    (RequestCancelled, 11),
    (Unauthenticated, 13),
    (PermissionDenied, 14),
    (AttnserveError, 1),
)

EXIT_INVALID_RUN: Final = 12
"""Exit code of a load test whose figures describe the client rather than the server."""

CODES_HELP: Final = (
    "Exit codes: 0 success, 2 wrong command line, 3 invalid request, 4 no such model, 5 unsupported, "
    "6 response too large, 7 overloaded, 8 not serving, failed or unreachable, 9 timed out, "
    "10 internal error of the server, "
    "11 cancelled, 12 invalid load test, 13 no valid token, 14 the token lacks a scope, 1 anything else."
)


def exit_code_of(error: AttnserveError) -> int:
    """Return the exit code for an error."""
    return next(code for kind, code in EXIT_CODES if isinstance(error, kind))


def sentence_of(error: AttnserveError, server: str) -> str:
    """Describe a failure in one line, with field, value and limit where the error has them."""
    if isinstance(error, ServerUnreachable):
        return f"no server answers at {server}; check the address, that attnserve-server runs there, and TLS (--ca)"
    if isinstance(error, DeadlineExpired) and error.reason != NOT_READY:
        return f"{server} did not answer in time; set a longer --timeout"
    if isinstance(error, Unauthenticated):
        return f"{error.message}; the options --token and --token-file precede the command"
    if isinstance(error, InternalFault) and error.request_id:
        return f"internal error of the server; its log has the details under request id {error.request_id}"
    if error.violations:
        return "; ".join(f"{each.field}: {each.description}" for each in error.violations)
    return error.message


@contextmanager
def reported(server: str, *, as_json: bool) -> Iterator[None]:
    """Print an error raised inside the block as one line (or JSON) on stderr, and exit with its code."""
    try:
        yield
    except AttnserveError as error:
        sentence = clean(sentence_of(error, server))
        if as_json:
            facts = {
                "code": error.code,
                "reason": error.reason,
                "message": sentence,
                "request_id": error.request_id,
                "metadata": dict(error.metadata),
                "violations": [{"field": each.field, "description": each.description} for each in error.violations],
            }
            sys.stderr.write(json.dumps({"error": facts}) + "\n")
        else:
            sys.stderr.write(f"attnserve: {sentence}\n")
        raise typer.Exit(exit_code_of(error)) from None
