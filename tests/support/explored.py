"""A page of the explorer in a browser, as tests use it. What takes too long raises Playwright's TimeoutError."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

INSTALL = "needs a browser: apt-get install chromium fonts-dejavu-core, and pip install 'attnserve[browser]'"
LABELS = ("<img src=x onerror=alert(1)>", "plain", "\u202eevil")
"""Names of the labels of `classifier`, which must stay text."""

PICTURES = Path(__file__).parents[2] / "docs/pictures"
MOST_PICTURE_BYTES = 200_000


def save(shown: Any, name: str, tmp_path: Path, **options: object) -> None:
    """Take a picture of a page, or of an element, into docs/pictures if ATTNSERVE_PICTURES is set."""
    path = (PICTURES if os.environ.get("ATTNSERVE_PICTURES") else tmp_path) / name
    shown.screenshot(path=path, **options)
    assert 1_000 < path.stat().st_size < MOST_PICTURE_BYTES


@dataclass
class Opened:
    """A page of the browser, what it requested, and what its console holds."""

    page: Any
    address: str
    requests: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)
    expected: set[str] = field(default_factory=set)
    """Parts of messages of the console that a test expects."""

    def run(self, text: str) -> None:
        """Type a text, run it, and wait for the words."""
        self.page.fill("#text", text)
        self.page.press("#text", "Control+Enter")
        self.settled()

    def settled(self) -> None:
        """Wait until no run is in progress, and the words are there."""
        self.page.locator("#status", has_text=re.compile(r"(ms|of \d+)\.$")).wait_for()
        self.page.wait_for_selector("#ask:not([aria-busy])")

    @property
    def runs(self) -> list[str]:
        """The requests that ran sequences."""
        return [url for url in self.requests if url.endswith(":infer")]

    @property
    def words(self) -> list[str]:
        """The texts of the words of the first map that are shown."""
        return self.page.locator(".board >> nth=0").locator(".token:not([hidden])").all_text_contents()

    @property
    def links(self) -> list[tuple[str, str, str]]:
        """Both ends and the weight of each listed link of the first map."""
        found = []
        for entry in self.page.locator(".board >> nth=0").locator(".links .link").all():
            ends = entry.locator(".isolated").all_text_contents()
            found.append((ends[0], ends[1], entry.locator(".value").text_content()))
        return found


Open = Callable[..., Opened]
"""Opens the explorer of a server: `(server, fragment="", path="/explore", **options of the browser's context)`."""


def png(colours: npt.NDArray[np.uint8]) -> bytes:
    """Return colours, uint8 (height, width, 3), as an image in the PNG format, which is exact. Source: RFC 2083."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = colours.shape
    rows = b"".join(b"\0" + row.tobytes() for row in colours)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
