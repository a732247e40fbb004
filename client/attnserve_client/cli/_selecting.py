"""Turn the options of a command into selections of attention and labels."""

from __future__ import annotations

from typing import Any, Literal, cast

import typer

from attnserve_client import AttentionSelection, LabelSelection, ModelInfo


def labels_for(model: ModelInfo, top: int, unit: Literal["word", "token"]) -> LabelSelection | None:
    """Return the labels to request; None for a model without a head."""
    return None if model.head is None else LabelSelection(top_k=top, unit=unit)


def selection(layer: str, heads: str, unit: Literal["word", "token"], *, keep_special: bool) -> AttentionSelection:
    """Return the selection of a map for each layer, or of one for `mean` and `rollout`.

    Raises:
        BadParameter: A layer or a head is no number and no choice.
    """
    special: Literal["keep", "drop"] = "keep" if keep_special else "drop"
    chosen: Any = heads if heads in ("mean", "max", "each") else numbers(heads, "--heads")
    if layer in ("mean", "rollout"):
        joined = cast("Literal['mean', 'rollout']", layer)
        return AttentionSelection(heads=chosen, layer_reduction=joined, unit=unit, special_tokens=special)
    return AttentionSelection(layers=numbers(layer, "--layers"), heads=chosen, unit=unit, special_tokens=special)


def numbers(text: str, option: str) -> list[int]:
    """Return the numbers of a list with commas.

    Raises:
        BadParameter: One is no number.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number and no choice of this option", param_hint=option) from None
