"""Find the role of an input of whole numbers: by its name, or by the size of the table that it looks up.

A role is what the server fills an input with, such as token ids. An input of unknown meaning gets none, and no error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx

from attnserve_server.conversion.inputs.vocabulary import vocabulary_size_of
from attnserve_server.model.manifest import InputRole

_NUMBERED = re.compile(r"[._:]\d+$")
"""Suffixes that exporters add to a name: `input_ids_0`, `input.1`, `ids:0`."""
_IDS = re.compile(r"(?:^|_)(?:ids|tokens?)$")
_OTHER_IDS = re.compile(
    r"(?:^|_)(?:position|pos|type|segment|class|label|language|lang|task|expert|image|user)s?_?ids?$"
)
_TYPES = {"token_type_ids", "segment_ids", "token_types", "type_ids", "segments", "input_type_ids"}
_POSITIONS = {"position_ids", "positions", "pos_ids", "position"}
_MASKS = re.compile(
    r"^(?:(?:encoder|decoder|source|target|src|tgt|text|query|passage)_)?(?:attention|attn|input)_mask$|^mask$"
)
"""Masks that are 1 where there is data. A `padding_mask` may be 1 or 0 there, and is not among them."""
_SECOND = re.compile(r"(?:^|_)(?:decoder|target|tgt|labels?|prev_output|second|passage|hypothesis)(?:_|$)")
_TYPES_AT_MOST = 2
"""The most rows of a table of token types, where the name does not state the role."""


def plain_name(name: str) -> str:
    """Return an input's name in lower case, without the serving prefix and the number that exporters add."""
    bare = name.lower().removeprefix("serving_default_")
    while (shorter := _NUMBERED.sub("", bare)) != bare:
        bare = shorter
    return bare


def is_second(name: str) -> bool:
    """Return whether an input belongs to the second of two texts, such as a decoder's, by its name."""
    return _SECOND.search(plain_name(name)) is not None


def is_position(name: str) -> bool:
    """Return whether an input holds positions, by its name."""
    return plain_name(name).removeprefix("decoder_") in _POSITIONS


def roles_of(graph: onnx.GraphProto, axes: Mapping[str, str]) -> tuple[dict[str, InputRole], dict[str, int]]:
    """Return the roles of inputs of whole numbers (B, T), and the vocabulary sizes of those that hold token ids.

    `input_ids` are token ids; other names of ids are, if the graph looks a table up with them. Where no name along an
    axis is one of ids, the input with the largest table holds them, regardless of its name. An input with a table of
    two rows holds token types.

    Args:
        graph: that has the inputs.
        axes: by input name, the symbol, or size, of its second axis.

    Returns:
        Roles by name, each at most once along an axis, and vocabulary sizes by name (0: not known).
    """
    sizes = {name: vocabulary_size_of(graph, name) for name in axes}
    roles: dict[str, InputRole] = {}

    def give(name: str, role: InputRole) -> None:
        if name not in roles and role not in {roles.get(other) for other in axes if axes[other] == axes[name]}:
            roles[name] = role

    for name in sorted(axes, key=lambda name: plain_name(name) != "input_ids"):
        plain = plain_name(name)
        if plain == "input_ids":
            give(name, InputRole.TOKEN_IDS)
        elif plain.removeprefix("decoder_") in _TYPES:
            give(name, InputRole.TOKEN_TYPE_IDS)
        elif _MASKS.search(plain):
            give(name, InputRole.ATTENTION_MASK)
        elif _IDS.search(plain) and not _OTHER_IDS.search(plain) and sizes[name]:
            give(name, InputRole.TOKEN_IDS)
    unsaid = [name for name in axes if name not in roles and sizes[name] and not _names_something_else(name)]
    for name in sorted(unsaid, key=lambda name: -sizes[name]):
        small = sizes[name] <= _TYPES_AT_MOST
        give(name, InputRole.TOKEN_TYPE_IDS if small else InputRole.TOKEN_IDS)
    return roles, {name: sizes[name] for name, role in roles.items() if role is InputRole.TOKEN_IDS}


def _names_something_else(name: str) -> bool:
    plain = plain_name(name)
    return is_position(name) or _OTHER_IDS.search(plain) is not None or "mask" in plain
