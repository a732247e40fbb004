"""What an input of whole numbers is for: told by its name, and, where names say little, by the table it looks up."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx

from attnserve_server.conversion.inputs.vocabulary import vocabulary_size_of
from attnserve_server.model.manifest import InputRole

_NUMBERED = re.compile(r"[._:]\d+$")
"""What exporters put behind a name: `input_ids_0`, `input.1`, `ids:0`."""
_IDS = re.compile(r"(?:^|_)(?:ids|tokens?)$")
_OTHER_IDS = re.compile(
    r"(?:^|_)(?:position|pos|type|segment|class|label|language|lang|task|expert|image|user)s?_?ids?$"
)
_TYPES = {"token_type_ids", "segment_ids", "token_types", "type_ids", "segments", "input_type_ids"}
_POSITIONS = {"position_ids", "positions", "pos_ids", "position"}
_MASKS = re.compile(
    r"^(?:(?:encoder|decoder|source|target|src|tgt|text|query|passage)_)?(?:attention|attn|input)_mask$|^mask$"
)
"""Masks that are known to be 1 where there is data; a `padding_mask` may be either way round."""
_SECOND = re.compile(r"(?:^|_)(?:decoder|target|tgt|labels?|prev_output|second|passage|hypothesis)(?:_|$)")
_TYPES_AT_MOST = 2
"""Rows of a table of token types, where only the table tells."""


def plain_name(name: str) -> str:
    """An input's name without what exporters add to it: case, a serving prefix, a number."""
    bare = name.lower().removeprefix("serving_default_")
    while (shorter := _NUMBERED.sub("", bare)) != bare:
        bare = shorter
    return bare


def is_second(name: str) -> bool:
    """Whether an input belongs to the second of two texts, as a decoder's does, by its name."""
    return _SECOND.search(plain_name(name)) is not None


def is_position(name: str) -> bool:
    """Whether an input numbers the positions, by its name."""
    return plain_name(name).removeprefix("decoder_") in _POSITIONS


def roles_of(graph: onnx.GraphProto, axes: Mapping[str, str]) -> tuple[dict[str, InputRole], dict[str, int]]:
    """Roles of inputs of whole numbers, rank 2 with the batch, and the vocabularies of those that hold token ids.

    `input_ids` are token ids, as are other names that say so if the graph looks a table up with them. Where no name
    along an axis says so, the input that looks up the largest table holds them, whatever it is called; one that looks
    up two rows holds token types.

    Args:
        graph: whose inputs they are.
        axes: of each such input, its name to the symbol, or length, of its second axis.

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
