"""Build the documentation site: copy the pages into .site/pages, complete them, and run Zensical strictly.

The pages keep their places in the repository, so that links among them hold. A link to another file of the repository
leads to a page that shows it. A link without a target, or a page that the navigation of zensical.toml lacks, ends the
build with exit code 1.

python docs/site.py [--serve]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES, HTML = ROOT / ".site/pages", ROOT / ".site/html"
TOP = ("README", "ARCHITECTURE", "CONTRIBUTING", "CHANGELOG", "CODE_OF_CONDUCT", "SECURITY")
FOLDERS = ("docs", "deploy", "findings", "changelog.d")
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".yml": "yaml", ".proto": "protobuf", ".json": "json"}
"""Of the files that a page shows; others are shown as text."""
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1", re.DOTALL | re.MULTILINE)
_LOADED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\ssrc=[\"']?((?:https?:)?//[^\s\"'>]+)"
    r"|<link\b(?![^>]*rel=[\"']?canonical)[^>]*?\shref=[\"']?((?:https?:)?//[^\s\"'>]+)"
)
_STYLED = re.compile(r"(?:url\(|@import )[\s\"']*((?:https?:)?//[^\s\"')]+)")
_RUN = re.compile(r"^ *<!-- (?:no-run|run-by|setup): .+? -->\n", re.MULTILINE)


class Broken(Exception):
    """A page that cannot be part of the site. The message names the page and the link."""


def pages() -> list[Path]:
    """Return the pages of the repository, relative to its root."""
    named = [ROOT / f"{name}.md" for name in TOP]
    found = [page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md")]
    kept = [page for page in found if not re.match(r"\S+\.\w+\.md$", page.name)]  # fragments of the changelog
    return sorted(page.relative_to(ROOT) for page in [*named, *kept])


def copy() -> list[Path]:
    """Write the pages, and those that show other files, and return their places in the site.

    Raises:
        Broken: a link leads to no file.
    """
    shutil.rmtree(PAGES.parent, ignore_errors=True)
    PAGES.mkdir(parents=True)
    shown: set[Path] = set()
    for page in pages():
        text = _RUN.sub("", (ROOT / page).read_text(encoding="utf-8"))
        write(page, "".join(rewritten(page, text, shown)))
    for path in sorted(shown):
        show(path)
    for folder in ("docs/pictures", "docs/images"):
        shutil.copytree(ROOT / folder, PAGES / folder)
    return [path.relative_to(PAGES) for path in PAGES.rglob("*.md")]


def rewritten(page: Path, text: str, shown: set[Path]) -> Iterator[str]:
    """Yield a page's text with links as the site has them, code left alone. Files to be shown join `shown`."""
    end = 0
    for fence in [*_FENCE.finditer(text), None]:
        prose = text[end : fence.start() if fence else len(text)]
        yield _LINK.sub(lambda link: f"{link[1]}{target(page, link[2], shown)}{link[3]}", prose)
        if fence:
            yield fence[0]
            end = fence.end()


def target(page: Path, link: str, shown: set[Path]) -> str:
    """Return a link as the site has it. Raises Broken."""
    name, _, anchor = link.partition("#")
    if re.match(r"[a-z]+:", link) or not name:
        return link
    file = (ROOT / page.parent / name).resolve()
    if not file.exists() or not file.is_relative_to(ROOT):
        raise Broken(f"{page}: {link} leads to no file of the repository")
    if file.suffix in (".png", ".svg"):
        return link
    if file.suffix == ".md":
        return re.sub(r"(^|/)README\.md(#|$)", r"\1index.md\2", link)
    shown.add(file.relative_to(ROOT))
    return visible(f"{name.rstrip('/')}{'/index.md' if file.is_dir() else '.md'}{'#' * bool(anchor)}{anchor}")


def visible(path: str) -> str:
    """Return a path without the dots before its names, because the site leaves such files out."""
    return re.sub(r"(^|/)\.(?=\w)", r"\1", path)


def show(path: Path) -> None:
    """Write the page that shows a file, or lists the files of a folder and shows them."""
    file = ROOT / path
    if file.is_dir():
        inside = sorted(each for each in file.iterdir() if each.is_file() and not each.name.startswith("."))
        lines = [f"- [{each.name}]({each.name}.md)" for each in inside]
        write(Path(visible(f"{path}/README.md")), f"# {path}\n\n" + "\n".join(lines) + "\n")
        for each in inside:
            show(each.relative_to(ROOT))
        return
    language = LANGUAGES.get(file.suffix, "text")
    text = file.read_text(encoding="utf-8")
    write(
        Path(visible(f"{path}.md")),
        f"# {path.name}\n\n`{path}` in the repository:\n\n````{language}\n{text.rstrip()}\n````\n",
    )


def write(place: Path, text: str) -> None:
    """Write a page to its place in the site; a README is the first page of its folder."""
    path = PAGES / (place.with_name("index.md") if place.name == "README.md" else place)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def listed() -> set[str]:
    """Return the pages of the navigation."""

    def within(part: object) -> Iterator[str]:
        if isinstance(part, str):
            yield part
        for each in part if isinstance(part, list) else part.values() if isinstance(part, dict) else ():
            yield from within(each)

    return set(within(tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]))


def loaded() -> list[str]:
    """Return what the built pages would load from other hosts: scripts, styles, fonts, pictures and frames."""
    found = set()
    for page in HTML.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        found |= {f"{page.relative_to(HTML)}: {one or other}" for one, other in _LOADED.findall(text)}
    for style in HTML.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        found |= {f"{style.relative_to(HTML)}: {address}" for address in _STYLED.findall(text)}
    return sorted(found)


def main() -> int:
    """Build the site, or serve it while it is written. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Build the documentation site into .site/html.")
    parser.add_argument("--serve", action="store_true", help="serve the site on loopback until Ctrl-C")
    serving = parser.parse_args().serve
    try:
        copy()
    except Broken as error:
        print(error, file=sys.stderr)
        return 1
    own = {str(page.with_name("index.md") if page.name == "README.md" else page) for page in pages()}
    if missing := own - listed():
        print(f"zensical.toml does not list: {', '.join(sorted(missing))}", file=sys.stderr)
        return 1
    program = str(Path(sys.executable).with_name("zensical"))
    line = [program, "serve"] if serving else [program, "build", "--clean", "--strict"]
    code = subprocess.run(line, cwd=ROOT, check=False).returncode  # noqa: S603 - the program beside this interpreter
    if not serving and (elsewhere := loaded()):
        print(f"loaded from other hosts: {', '.join(elsewhere)}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
