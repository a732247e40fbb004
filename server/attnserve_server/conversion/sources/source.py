"""Where an export's model comes from: a folder, or a model that ships inside an installed Python package."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.model.repository import TOKENIZER_FILE, sha256_of

PACKAGE_PREFIX = "package:"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A Hugging Face model folder. `name` is what provenance calls it: never a path."""

    path: Path
    name: str
    sha256: str

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer, if the folder has one in the format that the server reads."""
        path = self.path / TOKENIZER_FILE
        return path if path.is_file() else None

    def tokenizer_max_length(self) -> int | None:
        """The longest input that the tokenizer's configuration allows, in tokens; None where it names no limit."""
        limit = self._json("tokenizer_config.json").get("model_max_length")
        # Tokenizers without a limit write 1e30.
        return int(limit) if isinstance(limit, int | float) and 1 <= limit < 2**31 else None

    def architecture(self) -> str:
        """The class that its weights were saved from; empty where the configuration does not say."""
        named = self._json("config.json").get("architectures")
        return str(named[0]) if isinstance(named, list) and named else ""

    def normalises(self) -> bool:
        """Whether sentence-transformers would scale the pooled vector to length 1."""
        modules = self._json("modules.json", [])
        return isinstance(modules, list) and any(
            str(module.get("type", "")).endswith("Normalize") for module in modules
        )

    def _json(self, name: str, default: Any = None) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {} if default is None else default


def model_folder(source: str, expect_sha256: str = "") -> ModelFolder:
    """Find a source, and make sure of its weights.

    Args:
        source: a folder, or `package:<name>` for the folder `model` inside an installed package.
        expect_sha256: the sha256 that its model.safetensors must have; empty: any.

    Raises:
        BuildRefused: there is no such folder, it is no model, or its weights are others.
    """
    path, name = _locate(source)
    if not (path / "config.json").is_file():
        raise BuildRefused(f"{name} is no Hugging Face model folder: it has no config.json")
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        raise BuildRefused(f"{name} has no {WEIGHTS_FILE}; other formats of weights are not read")
    sha256 = sha256_of(weights)
    if expect_sha256 and sha256 != expect_sha256.lower():
        raise BuildRefused(f"{name}: sha256 of {WEIGHTS_FILE} is {sha256}, not the expected {expect_sha256.lower()}")
    return ModelFolder(path, name, sha256)


def _locate(source: str) -> tuple[Path, str]:
    if not source.startswith(PACKAGE_PREFIX):
        path = Path(source)
        if not path.is_dir():
            raise BuildRefused(f"{path.name or source} is no folder")
        return path, path.resolve().name
    package = source.removeprefix(PACKAGE_PREFIX)
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise BuildRefused(f"there is no installed package {package!r}")
    return Path(next(iter(found.submodule_search_locations))) / "model", source
