"""A real browser, `chromium` or `chromium-browser`, run on a page; what it dumps is parsed.

A browser that fails, or takes a minute, raises CalledProcessError or TimeoutExpired.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
"""Its path; empty where there is none."""

HOSTILE = (
    "<img src=x onerror=document.title='owned'>",
    "</script><script>document.title='owned'</script>",
    "\"'><svg>",
)


class Elements(HTMLParser):
    """Tags, title, token texts, listed links and the cue of a cut map, in the document that the browser dumps."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.tokens: list[str] = []
        self.places: list[str] = []
        self.items: list[str] = []
        self.cue = False
        self.title = ""
        self._into = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "li":
            self.items.append("")
        if "cue" in (dict(attrs).get("class") or "").split():
            self.cue = "hidden" not in dict(attrs)
        if "token" in (dict(attrs).get("class") or "").split():
            self.tokens.append("")
            self.places += re.findall("grid-area:[^;]*;", dict(attrs).get("style") or "")
            self._into = "token"
        else:
            self._into = tag

    def handle_endtag(self, tag: str) -> None:
        self._into = ""

    def handle_data(self, data: str) -> None:
        if self.items and data.strip() and self.tags[-1] == "span":
            self.items[-1] += data + " "
        if self._into == "token":
            self.tokens[-1] += data
        elif self._into == "title":
            self.title += data


def document(source: str, tmp_path: Path, width: int = 1200) -> Elements:
    """The document after a browser ran the page in a window of this width."""
    page = tmp_path / "page.html"
    page.write_text(source, encoding="utf-8")
    line = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    line += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom", page.as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True)
    return Elements(done.stdout)
