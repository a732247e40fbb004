"""The repository that other people's clients are run against, by `make clients`."""

from __future__ import annotations

from pathlib import Path

from ranking_bundle import write_ranking_repository


def write_clients_repository(root: Path, folder: Path) -> Path:
    """Write the models, and return `root`: `tiny` with a tokenizer, of versions 1 and 2, `plain` without one, and
    `ranker`, a cross-encoder.

    `folder`: a place for files of which the models are made.
    """
    root.mkdir(parents=True, exist_ok=True)
    return write_ranking_repository(root, folder)
