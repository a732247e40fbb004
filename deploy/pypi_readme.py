"""The README as PyPI shows it: without the repository around it, so that its links must be absolute.

A metadata hook of hatchling, which pyproject.toml names. The variable `ATTNSERVE_REPOSITORY` has the address of the
repository; `make dist` sets it to that of the clone's origin. Without it, links to files become plain text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

VARIABLE = "ATTNSERVE_REPOSITORY"
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|mailto:|#)([^)\s]+)\)")
_COMMENT = re.compile(r"^<!-- .*? -->\n", re.MULTILINE)


def absolute(text: str, repository: str, version: str) -> str:
    """Return a page of the repository's root with links that work anywhere.

    Args:
        text: the page, in Markdown.
        repository: an address such as https://example.org/owner/attnserve, or an empty string: links become their text,
            and pictures are left out.
        version: the release, whose tag is `v` and the version.
    """

    def link(found: re.Match[str]) -> str:
        image, label, path = found.groups()
        if not repository:
            return "" if image else label
        return f"{image}[{label}]({repository}/{'raw' if image else 'blob'}/v{version}/{path})"

    return _LINK.sub(link, _COMMENT.sub("", text))


class AbsoluteReadme(MetadataHookInterface):
    """Sets the field `readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the README to the metadata. Raises OSError if it cannot be read."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        address = os.environ.get(VARIABLE, "").removesuffix("/")
        shown = absolute(text, address, metadata["version"])
        metadata["readme"] = {"content-type": "text/markdown", "text": shown}
