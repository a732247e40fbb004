"""Extract the prose of a file as passages: text of consecutive lines, with the line number of each character.

Prose is Markdown, comments, docstrings, strings of more than one word, names of tests, and the comments of protos,
scripts and configuration. Code, quotations and addresses are masked.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath

MASK = "\0"
"""Replaces a character that is not prose: offsets stay, and no pattern matches across it."""

_CODE = re.compile(r"(`+)(?:(?!\n\s*\n).)+?\1", re.DOTALL)
_QUOTATION = re.compile(r'"(?=\S)[^"]{1,300}?"|“[^”]{1,300}”')
_ADDRESS = re.compile(r"https?://\S+|\]\([^)\s]*\)")
_FENCE = re.compile(r"\s*(```|~~~)")
_LIST_ITEM = re.compile(r"\s*(?:[-*+]|\d+\.)\s")
_LITERAL = re.compile(r"([A-Za-z]*)('''|\"\"\"|'|\")(.*)\2", re.DOTALL)
_FIELD = re.compile(r"\{\{|\}\}|\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}")
_HASH = re.compile(r"(?:^|\s)#+\s(.*)")
_SLASHES = re.compile(r"(?:^|\s)//\s?(.*)")
_STRING = re.compile(r'"([^"]*\s[^"]*)"')
_PROGRAM = re.compile(r"=\s*\w+\s*[(<]")
_F_START, _F_END = (getattr(tokenize, f"FSTRING_{end}", None) for end in ("START", "END"))  # since Python 3.12


@dataclass(frozen=True, slots=True)
class Passage:
    """Text and the line of the file that each of its characters is on. `lines` is as long as `text`."""

    text: str
    lines: tuple[int, ...]


def passages(path: str, text: str) -> Iterator[Passage]:
    """Yield the prose of a file.

    Args:
        path: its name or path, which decides how it is read.
        text: its content.

    Raises:
        ValueError: the kind of file is unknown.
        SyntaxError, tokenize.TokenError: a Python file that cannot be read.
    """
    yield from _reader(PurePath(path))(text)


def is_readable(path: str) -> bool:
    """Return whether `passages` knows this kind of file."""
    return PurePath(path).suffix in _BY_SUFFIX or PurePath(path).name in _BY_NAME


def _reader(path: PurePath) -> Callable[[str], Iterator[Passage]]:
    reader = _BY_SUFFIX.get(path.suffix) or _BY_NAME.get(path.name)
    if reader is None:
        raise ValueError(f"{path}: no reader for {path.suffix or path.name}; known are {', '.join(sorted(_BY_SUFFIX))}")
    return reader


def _passage(parts: Iterable[tuple[int, str]], *, quotations: bool = True) -> Passage:
    """Join (line number, text) pairs; mask code and addresses, and quotations where they are quotations."""
    kept = [(line, character) for line, text in parts for character in text]
    text = "".join(character for _, character in kept)
    for pattern in (_CODE, _ADDRESS, *((_QUOTATION,) if quotations else ())):
        text = pattern.sub(_masked, text)
    return Passage(text, tuple(line for line, _ in kept))


def _masked(match: re.Match[str]) -> str:
    return MASK * len(match[0])


def _markdown(text: str) -> Iterator[Passage]:
    """Paragraphs and table rows. Of code blocks only the comments, of block quotes nothing."""
    paragraph: list[tuple[int, str]] = []
    fenced, in_list, blank = False, False, True
    for number, line in enumerate(text.split("\n"), 1):
        fence = _FENCE.match(line) is not None
        if fence:
            fenced = not fenced
        indented = line.startswith("    ") and not in_list and (blank or not paragraph)
        if fence or fenced or indented or not line.strip() or line.startswith((">", "|")):
            yield _passage(paragraph)
            paragraph = []
            if line.startswith("|"):
                yield _passage([(number, line)])
            elif (fenced or indented) and (comment := _HASH.search(line)):
                yield _passage([(number, comment[1])])
        else:
            paragraph.append((number, f"{line}\n"))
            in_list = _LIST_ITEM.match(line) is not None or (in_list and line.startswith((" ", "\t")))
        blank = not line.strip()
    yield _passage(paragraph)


def _python(text: str) -> Iterator[Passage]:
    """Comments, docstrings, strings of more than one word, and names of tests."""
    strings: list[tuple[int, str]] = []
    comments: list[tuple[int, str]] = []
    for token, kind in _tokens(text):
        if kind == tokenize.STRING:
            strings += _literal(token)
        elif strings and kind not in (tokenize.NL, tokenize.COMMENT):
            yield from _string_passage(strings)
            strings = []
        if kind == tokenize.COMMENT:
            if comments and token.start[0] > comments[-1][0] + 1:
                yield _passage(comments)
                comments = []
            comments.append((token.start[0], token.string.lstrip("#:") + "\n"))
        elif kind == tokenize.NAME and token.string.startswith("test_"):
            yield _passage([(token.start[0], token.string.replace("_", " "))])
    yield from _string_passage(strings)
    yield _passage(comments)


def _tokens(text: str) -> Iterator[tuple[tokenize.TokenInfo, int]]:
    """Tokens with their kinds; a whole f-string is one STRING, as it is before Python 3.12."""
    lines = text.split("\n")
    depth, start = 0, (0, 0)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == _F_START:
            start = start if depth else token.start
            depth += 1
        elif token.type == _F_END:
            depth -= 1
            if not depth:
                (first, left), (last, right) = start, token.end
                body = lines[first - 1 : last]
                body[-1] = body[-1][:right]
                body[0] = body[0][left:]
                yield token._replace(string="\n".join(body), start=start), tokenize.STRING
        elif not depth:
            yield token, token.type


def _literal(token: tokenize.TokenInfo) -> list[tuple[int, str]]:
    match = _LITERAL.fullmatch(token.string)
    if match is None or "b" in match[1].lower():
        return []
    body = match[3]
    if "f" in match[1].lower():
        body = _FIELD.sub(lambda field: re.sub(r"[^\n]", MASK, field[0]), body)
    body = re.sub(r"\\[nrt]", "  ", body)
    return [(token.start[0] + offset, line) for offset, line in enumerate(body.splitlines(keepends=True))]


def _string_passage(strings: list[tuple[int, str]]) -> Iterator[Passage]:
    """Nothing for identifiers, keys and other single words, nor for programs, as ONNX text is one."""
    whole = "".join(text for _, text in strings)
    if re.search(r"\S\s+\S", whole) and not _PROGRAM.search(whole):
        yield _passage(strings)


def _lines(pattern: re.Pattern[str] | None = None, *, quotations: bool = True) -> Callable[[str], Iterator[Passage]]:
    """Make a reader of what `pattern` finds on each line (None: the line). Joins neighbouring lines."""

    def read(text: str) -> Iterator[Passage]:
        block: list[tuple[int, str]] = []
        for number, line in enumerate(text.split("\n"), 1):
            found = [line] if pattern is None else [match[match.lastindex or 0] for match in pattern.finditer(line)]
            if not found or not line.strip():
                yield _passage(block, quotations=quotations)
                block = []
            block += [(number, f"{part}\n") for part in found]
        yield _passage(block, quotations=quotations)

    return read


_COMMENTS = _lines(_HASH)
_BY_SUFFIX: dict[str, Callable[[str], Iterator[Passage]]] = {
    ".json": _lines(_STRING, quotations=False),
    ".md": _markdown,
    ".proto": _lines(_SLASHES),
    ".py": _python,
    ".sh": _lines(re.compile(f"{_HASH.pattern}|{_STRING.pattern}")),
    ".toml": _COMMENTS,
    ".yaml": _lines(quotations=False),
    ".yml": _lines(quotations=False),
}
_BY_NAME = {"Makefile": _COMMENTS, "Dockerfile": _COMMENTS, "run": _COMMENTS}
