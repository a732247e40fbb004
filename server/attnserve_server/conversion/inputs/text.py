"""Decide how text fills the inputs of a graph, and which of the tokenizer's own padding and truncation are kept.

A model has one text, or two where two inputs hold token ids, each along its own axis.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.inputs.roles import is_second
from attnserve_server.model.manifest import AxisSpec, InputRole, InputSpec, TextSpec


def text_of(
    inputs: Sequence[InputSpec], max_lengths: Mapping[str, int], pair_start: int | None = None
) -> TextSpec | None:
    """Return how text fills these inputs; None where none of them holds token ids.

    Where two inputs hold token ids, the second text fills the one with a decoder's name, or else the later one.

    Args:
        inputs: of the graph.
        max_lengths: by axis symbol; without the axis of an input of token ids, KeyError is raised.
        pair_start: the id that is put before the second text; None: no such.

    Raises:
        BuildRefused: the length of an input of token ids is fixed, there are more than two such inputs, or `pair_start`
            is given and there is only one.
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


def written_text(
    tokenizer: Path, text: TextSpec | None, inputs: Sequence[InputSpec], axes: Sequence[AxisSpec], steps: Steps
) -> TextSpec | None:
    """Return the text with the axes along which the tokenizer's own padding and truncation are kept.

    The tokenizer's padding is dropped where the graph ignores it: it is behind the text, masked, and along a paddable
    axis. A second text with its own axis needs no mask. Truncation alone is kept only where the model has no mask;
    elsewhere the server refuses a text that is too long.

    Args:
        tokenizer: its tokenizer.json.
        text: the axes of texts; None: the model takes no text.
        inputs: of the graph.
        axes: their checked properties.
        steps: receives a warning for each axis along which padding or truncation is kept.

    Raises:
        BuildRefused: the tokenizer pads to more tokens than the graph takes, and no mask hides them.
    """
    if text is None:
        return None
    sizing = Sizing.of(tokenizer)
    paddable = {axis.symbol for axis in axes if axis.paddable}
    masked = {spec.shape[0] for spec in inputs if spec.role is InputRole.ATTENTION_MASK and len(spec.shape) == 1}
    written: list[str] = []
    for axis, most in text.axes.items():
        hidden = axis in paddable and sizing.behind and (axis in masked or axis == text.pair_axis)
        if not (sizing.pads and not hidden) and not (sizing.cuts and axis not in masked and axis != text.pair_axis):
            continue
        if sizing.least > most:
            raise BuildRefused(
                f"{tokenizer.name} pads texts to {sizing.least} tokens, which no mask hides, and the graph takes "
                f"{most} at most: remove the padding from the file, or lower it"
            )
        written.append(axis)
        steps.warn(
            f"texts along {axis!r} are {sizing.words}, as in {tokenizer.name}: the model has no mask that hides padding"
        )
    return text.model_copy(update={"as_written": tuple(written)})


@dataclass(frozen=True, slots=True)
class Sizing:
    """The padding and truncation that a tokenizer.json declares.

    Attributes:
        least: tokens to which a text is padded; 0: none.
        multiple: lengths are padded to a multiple of this; 0: none.
        most: tokens to which a text is cut; 0: none.
        behind: whether padding follows the text.
    """

    least: int = 0
    multiple: int = 0
    most: int = 0
    behind: bool = True

    @classmethod
    def of(cls, tokenizer: Path) -> Sizing:
        """Read a file that is known to be a tokenizer.json."""
        described = json.loads(tokenizer.read_text(encoding="utf-8"))
        padding, truncation = described.get("padding") or {}, described.get("truncation") or {}
        strategy, multiple = padding.get("strategy"), int(padding.get("pad_to_multiple_of") or 0)
        least = int(strategy["Fixed"]) if isinstance(strategy, dict) else 0
        if multiple:
            least = -(-least // multiple) * multiple
        behind = padding.get("direction", "Right") == "Right"
        return cls(least, multiple, int(truncation.get("max_length") or 0), behind)

    @property
    def pads(self) -> bool:
        """Return whether a single text may be padded."""
        return self.least > 0 or self.multiple > 1

    @property
    def cuts(self) -> bool:
        """Return whether a single text may be cut."""
        return self.most > 0

    @property
    def words(self) -> str:
        """Return a description for a warning, such as "padded to 128 tokens and cut to 128"."""
        to = [f"to {self.least} tokens"] if self.least else [f"to a multiple of {self.multiple} tokens"]
        padded = [f"padded {to[0]}"] if self.pads else []
        return " and ".join([*padded, *([f"cut to {self.most}"] if self.cuts else [])])


def padding_id_of(tokenizer: Path | None) -> int:
    """Return the id that a tokenizer pads with: its own setting, else a token named like padding, else 0.

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
