"""Reference pages of the commands and of the gRPC contract, from the code and from the comments of the protos.

docs/generate.py writes them. Needs grpcio-tools. A proto that protoc refuses raises RuntimeError.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from attnserve_client.cli._app import app as client_app
from attnserve_server.cli._app import app as server_app
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).parents[1]
PROTOS = ROOT / "proto"
_ELSEWHERE = {"serve": "Its options are the [settings](configuration.md)."}
_SHORT = {"google.protobuf.Timestamp": "Timestamp"}
_Field = descriptor_pb2.FieldDescriptorProto
_TYPES = {number: name.removeprefix("TYPE_").lower() for name, number in _Field.Type.items()}


def commands() -> str:
    """Return the sections of both commands: usage, meaning, arguments and options, examples."""
    parts: list[str] = []
    for name, application in (("attnserve-server", server_app), ("attnserve", client_app)):
        group = typer.main.get_command(application)
        parts += [f"## {name}", "", _text(group.help), "", *_parameters(group)]
        for path, command in _commands(group, (name,)):
            parts += [f"### {' '.join(path)}", "", _text(command.help), ""]
            parts += [_ELSEWHERE[path[-1]], ""] if path[-1] in _ELSEWHERE else _parameters(command)
            parts += _examples(command.epilog)
    return "\n".join(parts)


def contract() -> str:
    """Return the sections of all protos of `attnserve.v1`: services, messages and enums, with their comments."""
    parts: list[str] = []
    for file in _files():
        comments = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
        parts += [f"## {file.name.rpartition('/')[2]}", "", _text(_head_of(file.name)), ""]
        for number, service in enumerate(file.service):
            rows = [
                (
                    f"`{method.name}`",
                    " → ".join(
                        (
                            _linked(method.input_type, method.client_streaming),
                            _linked(method.output_type, method.server_streaming),
                        )
                    ),
                    _text(comments.get((6, number, 2, at))),
                )
                for at, method in enumerate(service.method)
            ]
            parts += [f"### {service.name}", "", _text(comments.get((6, number))), ""]
            parts += _table(("method", "request → answer", "what it does"), rows)
        for number, message in enumerate(file.message_type):
            parts += _message(message, (4, number), comments, "")
        for number, enum in enumerate(file.enum_type):
            parts += _enum(enum, (5, number), comments, "")
    return "\n".join(parts)


def _files() -> list[descriptor_pb2.FileDescriptorProto]:
    sources = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / "attnserve/v1").glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "descriptors")
        line = ["protoc", f"--proto_path={PROTOS}", f"--descriptor_set_out={output}", "--include_source_info", *sources]
        if protoc.main(line) != 0:
            raise RuntimeError("protoc failed")
        found = descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes()).file
    first = "inference_service.proto"
    return sorted(found, key=lambda file: (not file.name.endswith(first), file.name))


def _head_of(name: str) -> str:
    lines = (PROTOS / name).read_text(encoding="utf-8").splitlines()
    return "\n".join(line.removeprefix("//").strip() for line in lines[: lines.index('syntax = "proto3";')])


def _message(
    message: descriptor_pb2.DescriptorProto, path: tuple[int, ...], comments: dict[tuple[int, ...], str], within: str
) -> Iterator[str]:
    name = f"{within}{message.name}"
    maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    yield from (f"### {name}", "", _text(comments.get(path)), "")
    rows = []
    for number, field in enumerate(message.field):
        kind = _field_type(field, maps)
        if field.HasField("oneof_index") and not field.proto3_optional:
            kind += f", one of `{message.oneof_decl[field.oneof_index].name}`"
        rows.append((f"`{field.name}`", kind, _text(comments.get((*path, 2, number)))))
    if rows:
        yield from _table(("field", "type", "meaning"), rows)
    for number, nested in enumerate(message.nested_type):
        if nested.name not in maps:
            yield from _message(nested, (*path, 3, number), comments, f"{name}.")
    for number, enum in enumerate(message.enum_type):
        yield from _enum(enum, (*path, 4, number), comments, f"{name}.")


def _enum(
    enum: descriptor_pb2.EnumDescriptorProto, path: tuple[int, ...], comments: dict[tuple[int, ...], str], within: str
) -> list[str]:
    rows = [
        (f"`{value.name}`", str(value.number), _text(comments.get((*path, 2, number))))
        for number, value in enumerate(enum.value)
    ]
    return [
        *(f"### {within}{enum.name}", "", _text(comments.get(path)), ""),
        *_table(("value", "number", "meaning"), rows),
    ]


def _field_type(field: descriptor_pb2.FieldDescriptorProto, maps: dict[str, descriptor_pb2.DescriptorProto]) -> str:
    short = field.type_name.rpartition(".")[2]
    if short in maps:
        key, value = maps[short].field
        return f"map of {_field_type(key, {})} to {_field_type(value, {})}"
    kind = _linked(field.type_name) if field.type_name else _TYPES[field.type]
    if field.label == _Field.LABEL_REPEATED:
        return f"list of {kind}"
    return f"{kind}, optional" if field.proto3_optional else kind


def _linked(name: str, streamed: bool = False) -> str:
    """Return a link to the section of a message or enum, whose heading is its name."""
    short = name.removeprefix(".attnserve.v1.")
    shown = f"`{_SHORT.get(name.lstrip('.'), name.lstrip('.'))}`" if short == name else f"[{short}](#{_anchor(short)})"
    return f"stream of {shown}" if streamed else shown


def _anchor(heading: str) -> str:
    return heading.lower().replace(".", "")


def _commands(group: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name), command


def _parameters(command: Any) -> list[str]:
    rows = []
    for parameter in command.params:
        if parameter.hidden:
            continue
        option = parameter.opts[0].startswith("-")
        names = (
            [*parameter.opts, *parameter.secondary_opts] if option else [parameter.metavar or parameter.name.upper()]
        )
        meaning = _text(parameter.help)
        if parameter.envvar:
            meaning += f" Variable: `{parameter.envvar}`."
        rows.append((", ".join(f"`{name}`" for name in names), _default(parameter), meaning))
    return _table(("argument or option", "default", "meaning"), rows) if rows else []


def _default(parameter: Any) -> str:
    if parameter.required:
        return "needed"
    shown = getattr(parameter, "show_default", True)
    if isinstance(shown, str):
        return shown
    value = parameter.default
    if value in (None, "", ()) or value == [] or callable(value):
        return ""
    return {True: "on", False: "off"}.get(value, f"`{value}`") if isinstance(value, bool) else f"`{value}`"


def _examples(epilog: str | None) -> list[str]:
    lines = [line.strip() for line in inspect.cleandoc(epilog or "").split("\n\n")]
    examples = [line for line in lines if line.startswith("attnserve")]
    return ["Examples:", "", *(f"- `{line}`" for line in examples), ""] if examples else []


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [*("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines), ""]


def _text(text: str | None) -> str:
    """Return a comment or help text as one line, in which `<` cannot begin a tag."""
    return " ".join(inspect.cleandoc(text or "").split()).replace("<", "&lt;")
