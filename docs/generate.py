"""Write reference/configuration.md, metrics.md and errors.md from the code they describe; `--check` only compares.

python docs/generate.py [--check]
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from annotated_types import Ge, Le, MinLen
from attnserve_server.config import Settings, flag_of, variable_of
from attnserve_server.domain.errors import MAX_VIOLATIONS
from attnserve_server.observability.metrics import SPECS
from attnserve_server.transport.status import DOMAIN, TABLE

FOLDER = Path(__file__).parent / "reference"
NOTE = "<!-- Made by docs/generate.py: change what it reads, then run `make docs`. -->"


def configuration() -> str:
    """Every setting: flag, variable, type, default, meaning."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = field.default
        shown = "none" if default is None or default == () else f"`{default}`"
        limits = _limits(field.metadata)
        kind = _kind(field.annotation) + (f", {limits}" if limits else "")
        rows.append((f"`{flag_of(name)}`", f"`{variable_of(name)}`", kind, shown, field.description or ""))
    return _page(
        "Configuration",
        "Every setting of `attnserve-server serve`. A flag wins over its variable, and a variable over the default. "
        "All faults are told together at start, and the server does not start with any. Sizes are in bytes; names that "
        "end in `_s` are in seconds.",
        ("Flag", "Variable", "Type", "Default", "What it does, and why its default"),
        rows,
    )


def metrics() -> str:
    """Every metric: type, labels, meaning, and why a histogram has its buckets."""
    rows = []
    for spec in SPECS:
        buckets = ""
        if spec.buckets:
            buckets = f"{', '.join(f'{bound:g}' for bound in spec.buckets)}: {spec.why_buckets}"
        labels = ", ".join(f"`{label}`" for label in spec.labels)
        rows.append((f"`{spec.name}`", spec.kind.__name__.lower(), labels, spec.help, buckets))
    return _page(
        "Metrics",
        "What `/metrics` exports, beside the process's and the interpreter's own. Labels are loaded models and small "
        "closed sets, never text from a caller: the number of series does not grow with traffic.",
        ("Name", "Type", "Labels", "What it counts", "Buckets, and why"),
        rows,
    )


def errors() -> str:
    """Every error: code, reason, details, what a caller can do."""
    rows = []
    for row in TABLE:
        first = (row.error.__doc__ or "").splitlines()[0]
        details = ["ErrorInfo"]
        details += ["RetryInfo"] if row.retry else []
        details += ["BadRequest"] if row.code.name == "INVALID_ARGUMENT" else []
        metadata = ", ".join(f"`{key}`" for key in (*row.metadata, "request_id"))
        rows.append((f"`{row.code.name}`", f"`{row.error.reason}`", ", ".join(details), metadata, first, row.remedy))
    page = _page(
        "Errors",
        "How failures are told. Each carries a `google.rpc.Status` in the trailer `grpc-status-details-bin` (on a "
        f"stream: in the message's `status`), with an `ErrorInfo` of domain `{DOMAIN}` whose `metadata` holds the keys "
        f"below. A `BadRequest` names up to {MAX_VIOLATIONS} fields by their path in the request, each with its limit "
        "and the value received. "
        "No message holds a path of the server, a traceback or an unprintable character, and no failure is UNKNOWN.",
        ("Code", "Reason", "Details", "Metadata", "What happened", "What to do"),
        rows,
    )
    return page + (
        "\nSome come from gRPC itself, without details: `UNIMPLEMENTED` for a method that there is none of, "
        "`RESOURCE_EXHAUSTED` for a message over `max_request_bytes`, `DEADLINE_EXCEEDED` and `CANCELLED` where the "
        "caller's own side noticed first; and `NOT_FOUND` from the health service for a name that it has never heard.\n"
    )


PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration,
    "metrics.md": metrics,
    "errors.md": errors,
}


def _page(title: str, opening: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [NOTE, "", f"# {title}", "", opening, "", _row(head), _row(("---",) * len(head))]
    lines += [_row(row) for row in rows]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _kind(annotation: Any) -> str:
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_kind(part) for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Annotated:
        # Limits of an optional setting stand within its type, where pydantic gives them as one field.
        kind, *fields = get_args(annotation)
        return ", ".join([_kind(kind), *(limits for field in fields if (limits := _limits(field.metadata)))])
    if get_origin(annotation) is tuple:
        return "list"
    if get_origin(annotation) is dict:
        return "key=value list"
    names = {int: "integer", float: "number", str: "text", Path: "path"}
    return names.get(annotation) or ", ".join(f"`{value}`" for value in get_args(annotation))


def _limits(metadata: Iterable[Any]) -> str:
    told = {Ge: "at least {0.ge}", Le: "at most {0.le}", MinLen: "not empty"}
    return ", ".join(told[type(limit)].format(limit) for limit in metadata if type(limit) in told)


def main() -> int:
    """Writes the pages, or with `--check` says which ones are not what would be written."""
    checking = "--check" in sys.argv[1:]
    stale = []
    for name, make in PAGES.items():
        path, text = FOLDER / name, make()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not checking:
            path.write_text(text, encoding="utf-8")
    if checking and stale:
        print(f"out of date: {', '.join(stale)}; run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
