"""Check the project's prose against the word list in prose.toml, and print what to write instead.

What counts as prose is in prose_text.py. Exits with 1 if a listed word is found outside the folders that are exempt,
and with 2 if an entry of the list lacks a field or has a bad pattern. A list that is no TOML raises TOMLDecodeError,
and a Python file that cannot be parsed SyntaxError or tokenize.TokenError.

python docs/prose.py [--json] [--all] [PATH ...]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from prose_text import is_readable, passages

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True, slots=True)
class Word:
    """One entry of the list: a pattern, what to write instead, and the reason."""

    pattern: re.Pattern[str]
    instead: str
    why: str


@dataclass(frozen=True, slots=True)
class Allowed:
    """An exception: in files that match the glob `path`, text that matches `text` may hold listed words."""

    path: str
    text: re.Pattern[str]


@dataclass(frozen=True, slots=True)
class Hit:
    """A listed word in a file's prose."""

    path: str
    line: int
    found: str
    instead: str
    why: str


@dataclass(frozen=True, slots=True)
class WordList:
    """The content of prose.toml: the words, the exceptions, and globs of paths that are skipped or exempt."""

    words: tuple[Word, ...]
    any_word: re.Pattern[str]
    allowed: tuple[Allowed, ...]
    skipped: tuple[str, ...]
    exempt: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> WordList:
        """Read a list. Raises KeyError for an entry without one of its fields, re.error for a bad pattern."""
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        exceptions = [*table.get("allowed", []), *table.get("skipped", [])]
        for row in exceptions:
            if not row.get("why"):
                raise KeyError(f"{path.name}: the exception for {row['path']} has no reason; add `why`")
        return cls(
            tuple(Word(_pattern(row["find"]), row["instead"], row["why"]) for row in table["word"]),
            _pattern("|".join(row["find"] for row in table["word"])),
            tuple(Allowed(row["path"], _pattern(row["text"])) for row in table.get("allowed", [])),
            tuple(row["path"] for row in table.get("skipped", [])),
            tuple(table.get("exempt", [])),
        )

    def check(self, path: str, text: str) -> list[Hit]:
        """Return the hits in one file, by line.

        Args:
            path: the file's path from the root of the project, with forward slashes.
            text: its content.
        """
        allowed = [row.text for row in self.allowed if fnmatch.fnmatch(path, row.path)]
        hits = []
        for passage in passages(path, text):
            if not self.any_word.search(passage.text):
                continue
            spans = [match.span() for pattern in allowed for match in pattern.finditer(passage.text)]
            for word in self.words:
                for match in word.pattern.finditer(passage.text):
                    if any(start <= match.start() and match.end() <= end for start, end in spans):
                        continue
                    found = " ".join(match[0].split())
                    hits.append(Hit(path, passage.lines[match.start()], found, word.instead, word.why))
        return sorted(hits, key=lambda hit: hit.line)


def _pattern(find: str) -> re.Pattern[str]:
    """Whole words in any case; a space matches any white space, line breaks included."""
    spaced = find.replace(" ", r"\s+")
    return re.compile(rf"(?<!\w)(?:{spaced})(?!\w)", re.IGNORECASE)


def matches(path: str, globs: Iterable[str]) -> bool:
    """Return whether one of `globs` matches a path, or is the folder that the file is directly in."""
    return any(fnmatch.fnmatch(path, glob) or str(PurePosixPath(path).parent) == glob for glob in globs)


def visible_files(root: Path, paths: Iterable[str]) -> list[str]:
    """Return `paths` and the files below them that no hidden folder holds, for a tree without git."""
    chosen = [root / path for path in paths] or [root]
    found = (file.relative_to(root) for top in chosen for file in (top, *sorted(top.rglob("*"))))
    return [str(file) for file in found if not any(part.startswith(".") for part in file.parts)]


def tracked_files(root: Path, paths: Iterable[str]) -> Iterator[str]:
    """Yield the readable files below `paths` that git tracks or would track, from the root."""
    # A checkout that belongs to another user counts too.
    line = ["git", "-c", f"safe.directory={root}", "-C", str(root), "ls-files", "--cached", "--others"]
    line += ["--exclude-standard", "--deduplicate", "--", *paths]
    listed = subprocess.run(line, capture_output=True, text=True, check=False)  # noqa: S603 - git itself
    names = listed.stdout.splitlines() if listed.returncode == 0 else visible_files(root, paths)
    for path in names:
        if is_readable(path) and (root / path).is_file():
            yield path


def main(arguments: list[str] | None = None) -> int:
    """Print the hits, by file or as JSON, with a count by folder. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Check the project's prose against docs/prose.toml.")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files or folders; default: the whole project")
    parser.add_argument("--json", action="store_true", help="print a list of objects: path, line, found, instead, why")
    parser.add_argument("--all", action="store_true", help="include the folders that prose.toml exempts for now")
    parser.add_argument("--list", type=Path, default=LIST, help="the word list; default: %(default)s")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's root; default: this script's")
    chosen = parser.parse_args(arguments)
    try:
        words = WordList.read(chosen.list)
    except (KeyError, re.error) as error:
        parser.exit(2, f"{chosen.list}: {error.args[0]}\n")
    left_out = words.skipped if chosen.all else (*words.skipped, *words.exempt)
    paths = [path for path in tracked_files(chosen.root, chosen.paths) if not matches(path, left_out)]
    hits = [hit for path in paths for hit in words.check(path, (chosen.root / path).read_text(encoding="utf-8"))]
    if chosen.json:
        print(json.dumps([asdict(hit) for hit in hits], indent=1))
    else:
        for hit in hits:
            print(f"{hit.path}:{hit.line}: {hit.found!r}: write {hit.instead} ({hit.why})")
        for folder, count in sorted(Counter(str(Path(hit.path).parent) for hit in hits).items()):
            print(f"{count:6} {folder}")
        print(f"{len(hits)} hits in {len(paths)} files, {len(words.exempt) if not chosen.all else 0} folders exempt")
    return 1 if hits else 0


if __name__ == "__main__":
    sys.exit(main())
