"""Versions of the tiny model that have different answers, and their places in a repository.

A version is moved into its place by a rename, as an operator does it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from attnserve_server.model.repository import Bundle, write_bundle
from onnx import numpy_helper
from tiny_bundle import tiny_manifest

NAME = "tiny"


def scaled_files(files: Mapping[str, Path], factor: float, folder: Path) -> dict[str, Path]:
    """The tiny model's files with its table of embeddings multiplied by `factor`."""
    model = onnx.load(files["model.onnx"])
    table = next(one for one in model.graph.initializer if one.name == "table")
    table.CopyFrom(numpy_helper.from_array(np.float32(factor) * numpy_helper.to_array(table), "table"))
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    return {**files, "model.onnx": folder / "model.onnx"}


def put(root: Path, files: Mapping[str, Path], version: str, name: str = NAME) -> Bundle:
    """Put a version in its place, or in that of an earlier one of this number: two renames. Return it."""
    work = Path(tempfile.mkdtemp(dir=root, prefix=".work-"))
    made = write_bundle(work, tiny_manifest(name, version), files)
    place = root / name / version
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        place.rename(work / "old")
    made.path.rename(place)
    shutil.rmtree(work)
    return Bundle(place, made.manifest)


def hide(root: Path) -> None:
    """Move a repository away."""
    root.rename(_hidden(root))


def show(root: Path) -> None:
    """Move a repository back, in place of an empty folder."""
    if root.exists():
        root.rmdir()
    _hidden(root).rename(root)


def _hidden(root: Path) -> Path:
    return root.with_name(f".{root.name}.hidden")


def take_away(root: Path, version: str, name: str = NAME) -> None:
    """Remove a version: a rename, and then its files."""
    hidden = root / name / f".{version}.old"
    (root / name / version).rename(hidden)
    shutil.rmtree(hidden)
