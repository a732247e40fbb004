"""What the command says and returns when a call fails: one sentence, and an exit code for each thing to do about it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import typer

from attnserve_client import (
    AttentionUnavailable,
    AttnserveError,
    BadAnswer,
    DeadlineExpired,
    InternalFault,
    InvalidRequest,
    ModelNotFound,
    NotServing,
    Overloaded,
    RequestCancelled,
    ResponseTooLarge,
    ServerUnreachable,
    TextUnavailable,
)
from attnserve_client.cli._text import clean

# The first that fits counts. 2 is a wrong command line, as typer has it.
EXIT_CODES: Final[tuple[tuple[type[AttnserveError], int], ...]] = (
    (InvalidRequest, 3),
    (ModelNotFound, 4),
    (AttentionUnavailable, 5),
    (TextUnavailable, 5),
    (ResponseTooLarge, 6),
    (Overloaded, 7),
    (NotServing, 8),
    (DeadlineExpired, 9),
    (InternalFault, 10),
    (BadAnswer, 10),
    (RequestCancelled, 11),
    (AttnserveError, 1),
)

EXIT_INVALID_RUN: Final = 12
"""Of a load test that was measured and tells more of the client than of the server."""

CODES_HELP: Final = (
    "Exit codes: 0 well, 2 wrong command line, 3 invalid request, 4 no such model, 5 the model cannot do this, "
    "6 answer too large, 7 overloaded, 8 not serving or unreachable, 9 timed out, 10 the server's fault, 11 cancelled, "
    "12 a load test that tells nothing, 1 anything else."
)


def exit_code_of(error: AttnserveError) -> int:
    """The exit code for an error."""
    return next(code for kind, code in EXIT_CODES if isinstance(error, kind))


def sentence_of(error: AttnserveError, server: str) -> str:
    """What went wrong, in one line, with field, limit and value where there are any."""
    if isinstance(error, ServerUnreachable):
        return f"no server answers at {server}; is attnserve-server running there?"
    if isinstance(error, DeadlineExpired):
        return f"{server} did not answer in time; --timeout gives it longer"
    if isinstance(error, InternalFault) and error.request_id:
        return f"the server failed; its log has the rest under request id {error.request_id}"
    if error.violations:
        return "; ".join(f"{each.field}: {each.description}" for each in error.violations)
    return error.message


@contextmanager
def reported(server: str, *, as_json: bool) -> Iterator[None]:
    """Turns errors inside into a line on stderr and an exit code."""
    try:
        yield
    except AttnserveError as error:
        said = clean(sentence_of(error, server))
        if as_json:
            facts = {
                "code": error.code,
                "reason": error.reason,
                "message": said,
                "request_id": error.request_id,
                "metadata": dict(error.metadata),
                "violations": [{"field": each.field, "description": each.description} for each in error.violations],
            }
            sys.stderr.write(json.dumps({"error": facts}) + "\n")
        else:
            sys.stderr.write(f"attnserve: {said}\n")
        raise typer.Exit(exit_code_of(error)) from None
