"""Links among the pages: every file and anchor exists, and every page can be reached from the README.

Pages are the Markdown files of the root, docs/, deploy/ and findings/. A test fails with the links, or the names of
files in sources, that lead nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
_FENCES = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", re.MULTILINE)
_MENTION = re.compile(r"(?<![\w/])docs/[a-z0-9_./-]+\.(?:md|py|json|png)\b")
_SOURCES = ("server", "client", "proto", "tests", "bench", "examples", "deploy", "docs", "findings")
_TEXTS = {".md", ".py", ".proto", ".sh", ".toml", ".yaml", ".yml"}


def pages() -> list[Path]:
    folders = [ROOT / folder for folder in ("docs", "deploy", "findings")]
    found = [*ROOT.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))]
    return sorted(found)


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, made as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in _HEADING.findall(_FENCES.sub("", text)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found[anchor] = found.get(anchor, -1) + 1
    return {anchor if not number else f"{anchor}-{number}" for anchor, n in found.items() for number in range(n + 1)}


def links(page: Path, text: str) -> Iterator[tuple[str, Path, str]]:
    """Yield each relative link of a page: as written, the file it names, its anchor or an empty string."""
    for link in _LINK.findall(_CODE.sub("", _FENCES.sub("", text))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        yield link, (page.parent / name).resolve() if name else page, anchor


def broken(page: Path, text: str) -> list[str]:
    """Return the links of a page that name no file, or no heading of it."""
    found = []
    for link, target, anchor in links(page, text):
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            found.append(link)
    return found


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    assert broken(page, page.read_text(encoding="utf-8")) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# One `thing`, and more\n\n## Twice\n\n## Twice\n\n```\n# no heading\n```\n")
    good = (
        "[a](other.md) [b](other.md#one-thing-and-more) [c](other.md#twice-1) [d](https://example.org/x) `[e](none.md)`"
    )
    assert broken(page, good) == []
    bad = ["none.md", "other.md#no-heading", "other.md#twice-2"]
    assert broken(page, " ".join(f"[x]({link})" for link in bad)) == bad


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, left = set[Path](), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        left += [target for _, target, _ in links(page, page.read_text(encoding="utf-8"))]
    assert [str(page.relative_to(ROOT)) for page in pages() if page not in seen] == [], "no page links to these"


def test_pages_and_pictures_named_in_sources_exist() -> None:
    files = [path for folder in _SOURCES for path in (ROOT / folder).rglob("*") if path.suffix in _TEXTS]
    files += [path for path in ROOT.iterdir() if path.suffix in _TEXTS or path.name == "Makefile"]
    files.remove(ROOT / "zensical.toml")  # names pages as the site has them; its own test compares both
    missing = {
        f"{path.relative_to(ROOT)}: {mention}"
        for path in files
        for mention in _MENTION.findall(re.sub(r"https?://\S+", "", path.read_text(encoding="utf-8")))
        if not (ROOT / mention).exists()
    }
    assert missing == set()


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md", "docs/adr/0003-batching.md"])
def test_modules_named_in_pages_exist(page: str) -> None:
    """A name such as `transport/wire.py` is the end of a module's path."""
    modules = [str(path) for folder in ("server", "client", "tests", "docs") for path in (ROOT / folder).rglob("*.py")]
    named = re.findall(r"`([\w/]+\.py)`", (ROOT / page).read_text(encoding="utf-8"))
    assert named
    assert [name for name in named if not any(module.endswith(f"/{name}") for module in modules)] == []
