"""How text becomes a graph's inputs: which axis the first text fills and which, if any, the second has to itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from attnserve_server.build.errors import BuildRefused
from attnserve_server.build.inputs.roles import is_second
from attnserve_server.model.manifest import InputRole, InputSpec, TextSpec


def text_of(
    inputs: Sequence[InputSpec], max_lengths: Mapping[str, int], pair_start: int | None = None
) -> TextSpec | None:
    """The text of a model with these inputs; None where none of them holds token ids.

    Where two inputs hold token ids, along axes of their own, the second text fills the one whose name says that it is a
    decoder's, or else the later one.

    Args:
        inputs: of the graph.
        max_lengths: by axis symbol.
        pair_start: the id that the second text starts behind; None: no such.

    Raises:
        BuildRefused: the length of an input of token ids is fixed, there are more than two such inputs, or a start is
            given where the second text has no input of its own.
    """
    ids = [spec for spec in inputs if spec.role is InputRole.TOKEN_IDS]
    if not ids:
        return None
    for spec in ids:
        if not isinstance(spec.shape[0], str):
            raise BuildRefused(f"input {spec.name!r} has a fixed length of {spec.shape[0]}: text needs a dynamic axis")
    if len(ids) > 2:
        raise BuildRefused(f"inputs {', '.join(spec.name for spec in ids)} all hold token ids: text can fill two")
    first, *second = sorted(ids, key=lambda spec: is_second(spec.name))
    axis = str(first.shape[0])
    if not second:
        if pair_start is not None:
            raise BuildRefused(f"a start of the second text was given, but {first.name!r} alone holds token ids")
        return TextSpec(axis=axis, max_tokens=max_lengths[axis])
    pair_axis = str(second[0].shape[0])
    return TextSpec(
        axis=axis,
        max_tokens=max_lengths[axis],
        pair_axis=pair_axis,
        pair_max_tokens=max_lengths[pair_axis],
        pair_start=pair_start,
    )


def padding_id_of(tokenizer: Path | None) -> int:
    """The id that a tokenizer pads with: its own setting, else that of a token named like padding, else 0.

    Raises:
        BuildRefused: the file is no tokenizer.json.
    """
    if tokenizer is None:
        return 0
    try:
        described = json.loads(tokenizer.read_text(encoding="utf-8"))
        padding = described.get("padding") or {}
        if "pad_id" in padding:
            return int(padding["pad_id"])
        named = {token["content"]: token["id"] for token in described.get("added_tokens") or []}
        return int(next((named[name] for name in ("[PAD]", "<pad>", "<|pad|>") if name in named), 0))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BuildRefused(f"{tokenizer.name} is no tokenizer.json") from None
