"""The repository that other people's clients are run against, by `make clients`."""

from __future__ import annotations

from pathlib import Path

from tiny_bundle import write_tiny_files, write_tiny_repository


def write_clients_repository(root: Path, folder: Path) -> Path:
    """Write the models, and return `root`: `tiny` with a tokenizer, of versions 1 and 2, and `plain` without one.

    `folder`: a place for files of which the models are made.
    """
    root.mkdir(parents=True, exist_ok=True)
    return write_tiny_repository(root, write_tiny_files(folder))
