"""The code blocks of the pages: what runs, what another program runs, and what does not run, with the reason.

A block is a fenced block of the README, CONTRIBUTING, ARCHITECTURE, docs/, deploy/ and findings/. tests/integration/
test_blocks.py runs them. Comments directly before a block, which no page shows, change that:

    <!-- no-run: REASON -->   it is not run; its expected output neither
    <!-- run-by: PATH -->     the script of CI, or a test, runs it
    <!-- setup: COMMAND -->   a command that runs before it

`output` is what the block before prints, `text` is nothing to run. Anything else in a page raises `WrongBlock`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
LANGUAGES = ("bash", "python", "yaml", "json", "output", "text")
PLAIN = ("text", "json", "yaml")
"""Languages of blocks that only have to be well-formed."""
_COMMENT = re.compile(r"<!-- (no-run|run-by|setup): (.+?) -->")
_COMMAND = re.compile(
    r"(\$ |(sudo )?(attnserve|attnserve-server|make|pip|curl|python|podman|kubectl|docker) |from |import )"
)
_TARGET = re.compile(r"\bmake ((?:[a-z0-9-]+ ?)+)")


class WrongBlock(Exception):
    """A block that the rules of this module do not admit. The message names page, line and remedy."""


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of a page.

    `line` is that of its fence, from 1. `paragraph` is the text before it, `setup` the commands that run before it.
    """

    page: str
    line: int
    language: str
    text: str
    paragraph: str
    setup: tuple[str, ...] = ()
    no_run: str = ""
    run_by: str = ""

    @property
    def fate(self) -> str:
        """One of: "runs", "run elsewhere", "marked", "compared", "parsed", "not code"."""
        if self.no_run:
            return "marked"
        if self.run_by:
            return "run elsewhere"
        return {"output": "compared", "yaml": "parsed", "json": "parsed", "text": "not code"}.get(self.language, "runs")

    @property
    def file(self) -> str:
        """The file in which the page has the reader save the block, or an empty string."""
        named = re.search(r"[Ss]ave this as `([\w./-]+)`[^`]*$", self.paragraph)
        first = re.match(r"# ([\w-]+\.\w+)\n", self.text)
        return named[1] if named else first[1] if first else ""


def pages(root: Path = ROOT) -> list[Path]:
    """Return the pages whose blocks count."""
    folders = [root / folder for folder in ("docs", "deploy", "findings")]
    named = [root / f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING", "SECURITY")]
    found = [*named, *(page for folder in folders for page in folder.rglob("*.md"))]
    return sorted(page for page in found if page.is_file())


def blocks(root: Path = ROOT) -> list[Block]:
    """Return the blocks of all pages, in order. Raises WrongBlock."""
    return [block for page in pages(root) for block in blocks_of(page.read_text("utf-8"), str(page.relative_to(root)))]


def blocks_of(text: str, page: str) -> Iterator[Block]:
    """Yield the blocks of a page. Raises WrongBlock for one without a known language, and for one that is indented."""
    comments: list[tuple[str, str]] = []
    paragraph, unrun = "", ""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        place = f"{page}:{token.map[0] + 1 if token.map else 0}"
        if token.type == "code_block":
            raise WrongBlock(f"{place}: an indented block; write a fenced one with its language")
        if token.type == "html_block":
            comments += _COMMENT.findall(token.content)
        elif token.type == "inline":
            comments, paragraph = [], token.content
        elif token.type == "fence":
            block = _block(token.info.strip(), token.content, place, comments, paragraph)
            if block.language == "output" and unrun and not block.no_run:
                block = Block(page, block.line, "output", block.text, paragraph, no_run=unrun)
            if block.language not in ("output", *PLAIN):
                unrun = block.no_run
            yield block
            comments, paragraph = [], ""


def _block(language: str, text: str, place: str, comments: list[tuple[str, str]], paragraph: str) -> Block:
    if language not in LANGUAGES:
        raise WrongBlock(f"{place}: the language is {language!r}; choose one of {', '.join(LANGUAGES)}")
    if language == "text" and _COMMAND.match(text):
        raise WrongBlock(f"{place}: `text` is for what cannot run, and this begins as a command")
    page, _, line = place.rpartition(":")
    of = {kind: tuple(value for each, value in comments if each == kind) for kind in ("no-run", "run-by", "setup")}
    if len(of["no-run"]) + len(of["run-by"]) > 1:
        raise WrongBlock(f"{place}: more than one `no-run` or `run-by`")
    no_run, run_by = "".join(of["no-run"]), "".join(of["run-by"])
    return Block(page, int(line), language, text, paragraph, of["setup"], no_run, run_by)


def targets(text: str) -> set[str]:
    """Return the targets of make that a block or a script calls, comments left out."""
    code = re.sub(r"#.*", "", text)
    return {target for call in _TARGET.findall(code.replace("stage ", "make ")) for target in call.split()}


def page(root: Path = ROOT) -> str:
    """Return the page that counts the blocks, and lists those that do not run."""
    found = blocks(root)
    counts = Counter(block.fate for block in found)
    fates = {
        "runs": "`bash` and `python`: run as they are, in order, in one folder for each page, against real servers",
        "run elsewhere": "a script of CI or another test runs them",
        "compared": "`output`: compared with what the block before prints; numbers may differ by 2 %",
        "parsed": "`yaml` and `json`: parsed",
        "marked": "not run, for the reason below",
        "not code": "`text`: formulas, drawings, messages",
    }
    reasons = Counter((block.page, block.no_run) for block in found if block.no_run)
    lines = [f"| {counts[fate]} | {fate} | {meaning} |" for fate, meaning in fates.items()]
    listed = [f"| `{where}` | {number} | {reason} |" for (where, reason), number in reasons.items()]
    return "\n".join(
        [
            f"The pages have {len(found)} code blocks. {counts['marked']} of them are marked `no-run`.",
            *("", "| blocks | fate | what that means |", "|---|---|---|", *lines),
            *("", "## Blocks that do not run", "", "| page | blocks | reason |", "|---|---|---|", *listed, ""),
        ]
    )
