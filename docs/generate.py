"""Write pages of reference/ from the code they describe, and two files of the Helm chart.

`--check` writes nothing, and exits with 1 if a page is out of date.

python docs/generate.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import blocks
import reference_pages
from annotated_types import Ge, Le, MinLen
from attnserve_server.config import Settings, flag_of, variable_of
from attnserve_server.config_bounds import size_text
from attnserve_server.config_engines import EngineSettings
from attnserve_server.conversion.finders import catalogue
from attnserve_server.domain.errors import MAX_VIOLATIONS
from attnserve_server.observability.metrics import SPECS
from attnserve_server.transport.status import DOMAIN, TABLE, http_status_of

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs/reference"
CHART = ROOT / "deploy/helm/attnserve"
SET_BY_CHART = (
    *("host", "grpc_port", "http_port", "repository", "ports_file", "tls_cert", "tls_key", "tls_client_ca"),
    *("tokens_file", "insecure", "drain_grace_s", "cache_dir", "require_provider"),
)
"""Settings that the chart derives from other values."""
NOTE = "<!-- Written by docs/generate.py: change the code that it reads, then run `make docs`. -->"


def configuration() -> str:
    """Return the page of settings: flag, variable, type, default, meaning."""
    rows = []
    for name in sorted(Settings.model_fields, key=EngineSettings.model_fields.__contains__):
        field = Settings.model_fields[name]
        default = field.default
        sized = isinstance(default, int) and name.endswith("_bytes")
        shown = "none" if default is None or default == () else f"`{size_text(default) if sized else default}`"
        limits = _limits(field.metadata)
        kind = _kind(field.annotation) + (f", {limits}" if limits else "")
        rows.append((f"`{flag_of(name)}`", f"`{variable_of(name)}`", kind, shown, field.description or ""))
    return _page(
        "Configuration",
        "Every setting of `attnserve-server serve`. A flag overrides its variable, and a variable the default. "
        "The server reports all invalid settings together, and does not start with any. Sizes are in bytes, or have a "
        "unit: `64MiB`. A variable with the prefix `ATTNSERVE_` that is no setting is an error. Names that "
        "end in `_s` are in seconds.",
        ("Flag", "Variable", "Type", "Default", "Effect, and the reason for the default"),
        rows,
    )


def metrics() -> str:
    """Return the page of metrics: type, labels, meaning, and the reason for a histogram's buckets."""
    rows = []
    for spec in SPECS:
        buckets = ""
        if spec.buckets:
            buckets = f"{', '.join(f'{bound:g}' for bound in spec.buckets)}: {spec.why_buckets}"
        labels = ", ".join(f"`{label}`" for label in spec.labels)
        rows.append((f"`{spec.name}`", spec.kind.__name__.lower(), labels, spec.help, buckets))
    return _page(
        "Metrics",
        "What `/metrics` exports, in addition to metrics of the process and the interpreter. Labels are loaded models "
        "and small closed sets, never text from a request, so the number of series does not grow with traffic.",
        ("Name", "Type", "Labels", "What it counts", "Buckets, and the reason for them"),
        rows,
    )


def errors() -> str:
    """Return the page of errors: code, reason, details, remedy."""
    rows = []
    for row in TABLE:
        first = (row.error.__doc__ or "").splitlines()[0]
        details = ["ErrorInfo"]
        details += ["RetryInfo"] if row.retry else []
        details += ["BadRequest"] if row.code.name == "INVALID_ARGUMENT" else []
        metadata = ", ".join(f"`{key}`" for key in (*row.metadata, "request_id"))
        http = http_status_of(row.error.__new__(row.error))
        rows.append(
            (f"`{row.code.name}`", str(http), f"`{row.error.reason}`", ", ".join(details), metadata, first, row.remedy)
        )
    page = _page(
        "Errors",
        "Every error of the server. Each carries a `google.rpc.Status` in the trailer `grpc-status-details-bin` (on a "
        f"stream: in the message's `status`), with an `ErrorInfo` of domain `{DOMAIN}` whose `metadata` holds the keys "
        f"below. A `BadRequest` names up to {MAX_VIOLATIONS} fields by their path in the request, each with its limit "
        "and the value received. "
        "No message holds a path of the server, a traceback or an unprintable character, and no failure is UNKNOWN.",
        ("Code", "HTTP", "Reason", "Details", "Metadata", "What happened", "What to do"),
        rows,
    )
    return page + (
        "\ngRPC itself raises some errors, without details: `UNIMPLEMENTED` for an unknown method, "
        "or for a compressed message, `RESOURCE_EXHAUSTED` for a message over the largest request of the models, "
        "`DEADLINE_EXCEEDED` and `CANCELLED` where the client's side detects them first. The health service answers "
        "`NOT_FOUND` for an unknown service name.\n"
    )


def operators() -> str:
    """Return the page of attention operators: operator, what a conversion does with it, forms or reason."""
    tables = (
        (catalogue.FOUND, "found"),
        (catalogue.UNTAPPED, "listed without weights"),
        (catalogue.WITHOUT_KERNEL, "refused: no kernel on the CPU"),
        (catalogue.PARTS, "no attention by itself"),
    )
    rows = [
        (f"`{domain or 'ai.onnx'}`", f"`{operator}`", what, how)
        for table, what in tables
        for (domain, operator), how in table.items()
    ]
    return _page(
        "Attention operators",
        "What a conversion does with the operators of ONNX and onnxruntime that compute attention, or whose documents "
        "mention it. Conversions run on the CPU. Attention that a file writes as MatMul and Softmax, or as features "
        "and sums, is found too ([ONNX files](onnx-files.md)).",
        ("Domain", "Operator", "What a conversion does", "Forms, or the reason"),
        rows,
    )


def command_options() -> str:
    """Return the page of every option of both commands."""
    opening = (
        "Every argument and option of `attnserve-server` and `attnserve`, as `--help` prints them. "
        "[Commands](commands.md) has their exit codes, and what they print where."
    )
    return f"{NOTE}\n\n# Options of the commands\n\n{opening}\n\n{reference_pages.commands()}"


def messages() -> str:
    """Return the page of the gRPC contract's services, messages and enums."""
    opening = (
        "The package `attnserve.v1`: every service, message and enum with the comments of its `.proto` file. "
        "[The contract](contract.md) describes how they are used."
    )
    return f"{NOTE}\n\n# Services and messages\n\n{opening}\n\n{reference_pages.contract()}"


def code_blocks() -> str:
    """Return the page that counts the code blocks of all pages."""
    opening = "Every code block of these pages runs in a test, or states why it does not."
    return f"{NOTE}\n\n# Code blocks\n\n{opening} {blocks.page(ROOT)}"


def chart_schema() -> str:
    """Return the schema of the chart's values, with the server's settings as they are now.

    All but `properties.settings.properties` is written by hand, in the file itself.
    """
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    known = Settings.model_json_schema()["properties"]
    schema["properties"]["settings"]["properties"] = {
        name: _chart_value(known[name]) for name in Settings.model_fields if name not in SET_BY_CHART
    }
    return json.dumps(schema, indent=2) + "\n"


def chart_rules() -> str:
    """Return the rules of Prometheus, because a chart cannot read files outside its folder."""
    return (ROOT / "deploy/prometheus/rules/attnserve.rules.yml").read_text(encoding="utf-8")


def _chart_value(known: dict[str, Any]) -> dict[str, Any]:
    """A setting in the chart: lists and options are text, as in a variable, and one without a value is left out."""
    [kind] = [part for part in known.get("anyOf", [known]) if part.get("type") != "null"]
    if kind["type"] in ("array", "object"):
        kind = {"type": "string"}
    limits = {key: value for key, value in kind.items() if key not in ("default", "title", "description", "format")}
    return {**limits, "description": known["description"]}


PAGES: dict[Path, Callable[[], str]] = {
    FOLDER / "configuration.md": configuration,
    FOLDER / "metrics.md": metrics,
    FOLDER / "errors.md": errors,
    FOLDER / "operators.md": operators,
    FOLDER / "command-options.md": command_options,
    FOLDER / "messages.md": messages,
    FOLDER / "blocks.md": code_blocks,
    CHART / "values.schema.json": chart_schema,
    CHART / "files/attnserve.rules.yml": chart_rules,
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
        # pydantic keeps the limits of an optional setting inside its type, as one field.
        kind, *fields = get_args(annotation)
        return ", ".join([_kind(kind), *(limits for field in fields if (limits := _limits(field.metadata)))])
    if get_origin(annotation) is tuple:
        return "list"
    if get_origin(annotation) is dict:
        return "key=value list"
    names = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}
    return names.get(annotation) or ", ".join(f"`{value}`" for value in get_args(annotation))


def _limits(metadata: Iterable[Any]) -> str:
    words = {Ge: "at least {0.ge}", Le: "at most {0.le}", MinLen: "not empty"}
    return ", ".join(words[type(limit)].format(limit) for limit in metadata if type(limit) in words)


def main() -> int:
    """Write the pages. With `--check`, only list the pages that are out of date, and return 1 if there are any."""
    parser = argparse.ArgumentParser(description="Write the reference pages of docs/ from the server's code.")
    parser.add_argument("--check", action="store_true", help="list the pages that are out of date, and write nothing")
    checking = parser.parse_args().check
    stale = []
    for path, make in PAGES.items():
        text = make()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.relative_to(ROOT).as_posix())
        if not checking:
            path.write_text(text, encoding="utf-8")
    if checking and stale:
        print(f"out of date: {', '.join(stale)}; run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
