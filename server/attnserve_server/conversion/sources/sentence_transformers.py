"""A sentence-transformers folder: the modules behind its transformer, its prompts and its activation, from its files.

The files are those that sentence-transformers 2 to 5.7 write. A module other than pooling, dense layers and
normalisation raises BuildRefused, because an embedding without it would be another one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.model.heads import Activation

MODES: Final = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""Ways of pooling, in the order in which older files concatenate them."""
_LEGACY: Final = (
    "pooling_mode_cls_token",
    "pooling_mode_max_tokens",
    "pooling_mode_mean_tokens",
    "pooling_mode_mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens",
    "pooling_mode_lasttoken",
)
"""Their names in files of sentence-transformers before 5.4, in the same order."""
DENSE_ACTIVATIONS: Final = ("Tanh", "Identity", "ReLU", "GELU", "Sigmoid", "SiLU")
_SCORE_ACTIVATIONS: Final[Mapping[str, Activation]] = {"Sigmoid": "sigmoid", "Identity": "identity"}


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A dense layer: weight (out, in), bias (out,) or None, and the name of its activation in torch.nn."""

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32] | None
    activation: str


@dataclass(frozen=True, slots=True)
class Modules:
    """What turns hidden states into an embedding: pooling, then dense layers and normalisations in their order.

    Attributes:
        modes: members of `MODES`, whose results are concatenated.
        steps: dense layers; None for a normalisation to length 1.
        own: whether the source's files state them, instead of an option.
    """

    modes: tuple[str, ...]
    steps: tuple[Dense | None, ...] = ()
    own: bool = False

    @property
    def normalized(self) -> bool:
        """Whether the embedding has the length 1."""
        return bool(self.steps) and self.steps[-1] is None

    def __str__(self) -> str:
        """Return a description such as `mean, normalized`."""
        named = ["normalized" if step is None else f"dense {len(step.weight)}" for step in self.steps]
        return ", ".join((" + ".join(self.modes), *named))


@dataclass(frozen=True, slots=True)
class Prompts:
    """The texts before a caller's text, by name, the name of the default one, and the similarity of embeddings.

    Cosine similarity is the default of the library.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    default: str = ""
    similarity: str = "cosine"


def modules_of(folder: Path) -> Modules | None:
    """Return the modules behind the transformer of a folder; None if it has no modules, or no pooling.

    Raises:
        BuildRefused: a module or a setting of one is not supported.
        KeyError: the file of a dense layer has no `linear.weight`.
    """
    listed = read_json(folder / "modules.json", [])
    if not isinstance(listed, list) or len(listed) < 2:
        return None
    modes: tuple[str, ...] = ()
    steps: list[Dense | None] = []
    for module in listed[1:]:
        kind, place = str(module.get("type", "")).rpartition(".")[2], folder / str(module.get("path", ""))
        if kind == "Pooling" and not modes:
            modes = _modes(place)
        elif kind == "Dense" and modes:
            steps.append(_dense(place))
        elif kind == "Normalize" and modes:
            steps.append(None)
        elif kind != "Dropout":
            raise _unsupported(f"modules.json has the module {kind or '?'} at {module.get('path', '')!r}")
    _check_lower_case(folder)
    return Modules(modes, tuple(steps), own=True) if modes else None


def prompts_of(folder: Path) -> Prompts:
    """Return the prompts of a folder; empty if it states none.

    Raises:
        BuildRefused: the default prompt does not exist, or pooling leaves the prompt out.
    """
    described = read_json(folder / "config_sentence_transformers.json", {})
    texts = {str(name): str(text or "") for name, text in (described.get("prompts") or {}).items()}
    default = str(described.get("default_prompt_name") or "")
    if default and default not in texts:
        raise BuildRefused(
            f"default_prompt_name {default!r} of config_sentence_transformers.json is none of its prompts"
        )
    if any(texts.values()) and not _pools_prompts(folder):
        raise _unsupported("the pooling leaves out the tokens of prompts (include_prompt is false)")
    return Prompts(texts, default, str(described.get("similarity_fn_name") or "cosine"))


def sizes_of(folder: Path) -> tuple[int, ...]:
    """Return the numbers of first values that are embeddings too (Matryoshka), as the configuration lists them."""
    listed = read_json(folder / "config.json", {}).get("matryoshka_dimensions") or ()
    return tuple(sorted({int(size) for size in listed}))


def max_length_of(folder: Path) -> int | None:
    """Return the greatest length in tokens that sentence-transformers uses; None if the folder states none."""
    limit = read_json(folder / "sentence_bert_config.json", {}).get("max_seq_length")
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def activation_of(folder: Path) -> Activation | None:
    """Return the activation of a reranker (a CrossEncoder); None if no file states one.

    Raises:
        BuildRefused: it is not supported.
    """
    config = read_json(folder / "config.json", {})
    named = (
        read_json(folder / "config_sentence_transformers.json", {}).get("activation_fn")
        or (config.get("sentence_transformers") or {}).get("activation_fn")
        or config.get("sbert_ce_default_activation_function")
    )
    if named is None:
        return None
    kind = str(named).rpartition(".")[2]
    if kind not in _SCORE_ACTIVATIONS:
        raise _unsupported(f"the scores of the reranker have the activation {named}")
    return _SCORE_ACTIVATIONS[kind]


def read_json(path: Path, default: Any) -> Any:
    """Return the content of a JSON file; `default` if there is none, or it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


def _unsupported(problem: str) -> BuildRefused:
    return BuildRefused(f"{problem}, which is not supported: add --no-head to export hidden states only")


def _modes(place: Path) -> tuple[str, ...]:
    config = read_json(place / "config.json", {})
    named = config.get("pooling_mode")
    if named is None:
        modes = tuple(mode for key, mode in zip(_LEGACY, MODES, strict=True) if config.get(key)) or ("mean",)
    else:
        modes = (named,) if isinstance(named, str) else tuple(map(str, named))
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise _unsupported(f"{place.name} pools by {unknown[0]!r}")
    return modes


def _dense(place: Path) -> Dense:
    config = read_json(place / "config.json", {})
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = name.rpartition(".")[2]
    if activation not in DENSE_ACTIVATIONS or not name.startswith("torch."):
        raise _unsupported(f"{place.name} has the activation {name}")
    if {config.get(key) or "sentence_embedding" for key in ("module_input_name", "module_output_name")} != {
        "sentence_embedding"
    }:
        raise _unsupported(f"{place.name} is not a layer of the embedding")
    weights = place / "model.safetensors"
    if not weights.is_file():
        raise BuildRefused(f"{place.name} has no model.safetensors; save the model in this format")
    tensors = load_file(weights)
    bias = tensors.get("linear.bias")
    return Dense(
        tensors["linear.weight"].astype(np.float32), None if bias is None else bias.astype(np.float32), activation
    )


def _pools_prompts(folder: Path) -> bool:
    """Return whether pooling includes the tokens of prompts."""
    listed = read_json(folder / "modules.json", [])
    configs = [read_json(folder / str(module.get("path", "")) / "config.json", {}) for module in listed[1:]]
    return all(config.get("include_prompt", True) for config in configs)


def _check_lower_case(folder: Path) -> None:
    """Refuse texts that sentence-transformers lower-cases, and the tokenizer does not."""
    if not read_json(folder / "sentence_bert_config.json", {}).get("do_lower_case"):
        return
    normalizer = read_json(folder / "tokenizer.json", {}).get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if not any(step.get("type") == "Lowercase" or step.get("lowercase") for step in steps):
        raise BuildRefused(
            "sentence_bert_config.json sets do_lower_case, and tokenizer.json does not lower-case: add a normalizer "
            "'Lowercase' to tokenizer.json"
        )
