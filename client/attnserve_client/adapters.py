"""Attention maps as the inputs of other tools: BertViz, CircuitsVis and inseq.

None of them is a dependency. torch and inseq are imported by the functions that return their types. Letters in shapes:
N layers, H heads, L queries, S keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from attnserve_client._attention import AttentionMap
from attnserve_client._results import InferenceResult
from attnserve_client._tokens import Token

if TYPE_CHECKING:
    import inseq

Maps = InferenceResult | Sequence[AttentionMap]
"""A result with attention, or its maps."""
Library = Literal["torch", "numpy"]

_INSTALL: Final = {
    "torch": "pip install torch, or pass tensors='numpy'",
    "inseq": "pip install inseq",
}


def to_bertviz(found: Maps, *, tensors: Library = "torch") -> dict[str, Any]:
    """Return the arguments of BertViz: `head_view(**to_bertviz(result))`, and the same for `model_view`.

    Select all heads and rows: `attention=AttentionSelection(unit="word")`, or True. Links come as weights with zeros.

    Args:
        found: A result, or maps of all layers to show, in their order.
        tensors: Type of the weights. BertViz takes `"torch"`; `"numpy"` needs no torch.

    Returns:
        Of a model of one sequence: `attention`, a list with float32 (1, H, L, L) for each layer; `tokens`, L texts; and
        for a pair of texts on one axis `sentence_b_start`, the position of the second text. Of an encoder-decoder:
        `cross_attention`, float32 (1, H, L, S), and where selected `encoder_attention` (1, H, S, S) and
        `decoder_attention` (1, H, L, L), with `encoder_tokens`, S texts, and `decoder_tokens`, L texts.

    Raises:
        ImportError: torch is missing.
        ValueError: There are no maps; the maps hold scores; they differ in heads, or lack rows or columns; or they are
            of more than two sequences.

    Source: Vig 2019, "A Multiscale Visualization of Attention in the Transformer Model"; parameters of BertViz 1.4.1.
    """
    maps = _maps(found)
    crossing = [each for each in maps if each.query_axis != each.key_axis]
    if not crossing:
        first = maps[0]
        _check_alike(maps, first.query_axis)
        given: dict[str, Any] = {"attention": _layers(maps, tensors), "tokens": _texts(first.key_tokens)}
        second = [place for place, token in enumerate(first.key_tokens) if token.segment == 1 and not token.special]
        if second:
            given["sentence_b_start"] = second[0]
        return given
    cross = crossing[0]
    given = {
        "cross_attention": _layers(crossing, tensors),
        "encoder_tokens": _texts(cross.key_tokens),
        "decoder_tokens": _texts(cross.query_tokens),
    }
    for name, axis in (("encoder_attention", cross.key_axis), ("decoder_attention", cross.query_axis)):
        own = [each for each in maps if each.query_axis == each.key_axis == axis]
        if own:
            given[name] = _layers(own, tensors)
    others = [each for each in maps if {each.query_axis, each.key_axis} - {cross.query_axis, cross.key_axis}]
    if others:
        raise ValueError(f"{others[0]!r} is of a third sequence; select maps of two")
    return given


def to_circuitsvis(attention: AttentionMap, *, tensors: Library = "numpy") -> dict[str, Any]:
    """Return the arguments of CircuitsVis: `attention_heads(**to_circuitsvis(result.attention[0]))`.

    The older `attention_patterns` takes the first two alone, and hides the weights above the diagonal of any map.

    Args:
        attention: A map of one sequence with all its rows; CircuitsVis has one list of tokens.
        tensors: Type of the weights.

    Returns:
        `tokens`, L texts; `attention`, float32 (H, L, L); `attention_head_names`, H names; and `mask_upper_tri`, True
        for causal maps alone: CircuitsVis hides weights above the diagonal unless it is False.

    Raises:
        ImportError: torch is missing.
        ValueError: The map is of two sequences, lacks rows or columns, or holds scores.

    Source: parameters of CircuitsVis 1.43.
    """
    _check_whole(attention)
    where = f"L{attention.layer}" if attention.layer >= 0 else "joined"
    names = [f"{where} joined"] if attention.is_joined else [f"{where} H{head}" for head in attention.heads]
    return {
        "tokens": _texts(attention.key_tokens),
        "attention": _as(np.array(attention.weights), tensors),
        "attention_head_names": names,
        "mask_upper_tri": attention.kind == "causal",
    }


def to_inseq(found: Maps, *, generated: bool | None = None) -> inseq.FeatureAttributionOutput:
    """Return the maps as an output of inseq, which aggregates, shows, compares and saves it.

    inseq has a column for each generated token, with the weights of the position that generated it: the one before. So
    the row of query j becomes the column of token j + 1, and the last row is left out.

    Args:
        found: A result, or maps of one kind, equal in heads and sides: the N layers.
        generated: Whether the queries are generated tokens, so that rows become columns of the next token. None for
            True unless the maps are of an encoder (`self`), whose rows become columns of the same token.

    Returns:
        A `FeatureAttributionOutput` with one sequence. Its attributions are float32 (S, T, N, H): of causal maps
        `target_attributions`, NaN for tokens that are not generated yet, else `source_attributions`. T is L - 1 for
        generated tokens, else L. Ids of tokens are their positions, because answers hold no ids. inseq's default
        aggregators for it are means over heads and layers.

    Raises:
        ImportError: inseq is missing.
        ValueError: There are no maps, or they differ in kind, heads or sides, hold scores, or have a single row that
            would be left out.

    Source: Sarti et al. 2023, "Inseq: An Interpretability Toolkit for Sequence Generation Models"; inseq 0.7.1.
    """
    sides = columns_of(found, generated=generated)
    try:
        from inseq.data import FeatureAttributionOutput  # noqa: PLC0415 - no dependency
        from inseq.data.attribution import MultiDimensionalFeatureAttributionSequenceOutput  # noqa: PLC0415
        from inseq.utils.typing import TokenWithId  # noqa: PLC0415
    except ImportError:
        raise ImportError(f"to_inseq() needs inseq: {_INSTALL['inseq']}") from None
    source, target = ([TokenWithId(token.text, token.index) for token in sides[name]] for name in ("source", "target"))
    attributions = {name: _as(sides[name], "torch") for name in sides if name.endswith("attributions")}
    empty: dict[str, Any] = {"step_scores": {}, "sequence_scores": {}}  # its aggregators fail on None
    sequence = MultiDimensionalFeatureAttributionSequenceOutput(
        source=source, target=target, attr_pos_start=sides["attr_pos_start"], **empty, _num_dimensions=2, **attributions
    )
    model = _maps(found)[0].model
    return FeatureAttributionOutput([sequence], info={"model_name": model, "attribution_method": "attention"})


def columns_of(found: Maps, *, generated: bool | None = None) -> dict[str, Any]:
    """Return what `to_inseq` gives to inseq, in plain types.

    Args:
        found: A result, or maps.
        generated: As in `to_inseq`.

    Returns:
        `source` and `target`, lists of `Token`; `attr_pos_start`, the first target token with a column; and float32
        (S, T, N, H), named `target_attributions` of causal maps, else `source_attributions`.

    Raises:
        ValueError: As in `to_inseq`.
    """
    maps = _maps(found)
    first = maps[0]
    for each in maps:
        same = (each.kind, each.query_tokens, each.key_tokens) == (first.kind, first.query_tokens, first.key_tokens)
        if not same or each.weights.shape != first.weights.shape:
            raise ValueError(f"{each!r} differs from {first!r}; inseq joins maps of one kind, heads and sides")
    shifted = first.kind != "self" if generated is None else generated
    if shifted and len(first.query_tokens) < 2:
        raise ValueError(f"{first!r} has one row, which generates a token that the map does not have")
    weights = np.stack([each.weights for each in maps])  # (N, H, L, S)
    if shifted:
        weights = weights[:, :, :-1]
    columns = np.ascontiguousarray(weights.transpose(3, 2, 0, 1))
    if first.kind != "causal":
        target = first.query_tokens[1:] if shifted else first.query_tokens
        return {
            "source": list(first.key_tokens),
            "target": list(target),
            "attr_pos_start": 0,
            "source_attributions": columns,
        }
    start = 1 if shifted else 0
    keys = np.array([token.index for token in first.key_tokens])
    queries = np.array([token.index for token in first.query_tokens])[: columns.shape[1]]
    columns[keys[:, None] > queries[None]] = np.nan
    return {
        "source": list(first.key_tokens[:start]),
        "target": list(first.key_tokens),
        "attr_pos_start": start,
        "target_attributions": columns,
    }


def _maps(found: Maps) -> list[AttentionMap]:
    maps = list(found.attention if isinstance(found, InferenceResult) else found)
    if not maps:
        raise ValueError("there is no attention map; pass attention=True, or an AttentionSelection, to the call")
    return maps


def _check_alike(maps: Sequence[AttentionMap], axis: str) -> None:
    for each in maps:
        if each.query_axis != axis or each.key_axis != axis:
            raise ValueError(f"{each!r} is of another sequence than the first map; select maps of one")
        _check_whole(each)


def _check_whole(attention: AttentionMap) -> None:
    if attention.query_axis != attention.key_axis:
        sides = f"{attention.query_axis} and {attention.key_axis}"
        raise ValueError(f"the map has two sides ({sides}), and this tool shows one sequence")
    if attention.query_tokens != attention.key_tokens:
        rows, columns = len(attention.query_tokens), len(attention.key_tokens)
        raise ValueError(f"the map has {rows} rows and {columns} columns; select it without `queries`")


def _layers(maps: Sequence[AttentionMap], tensors: Library) -> list[Any]:
    shapes = {each.weights.shape for each in maps}
    if len(shapes) > 1:
        raise ValueError(f"the layers have weights of shapes {sorted(shapes)}; BertViz stacks layers of one shape")
    return [_as(np.array(each.weights[None]), tensors) for each in maps]


def _texts(tokens: Sequence[Token]) -> list[str]:
    return [token.text for token in tokens]


def _as(array: npt.NDArray[np.float32], tensors: Library) -> Any:
    if tensors == "numpy":
        return array
    if tensors != "torch":
        raise ValueError(f"tensors is {tensors!r}; it must be 'torch' or 'numpy'")
    try:
        import torch  # noqa: PLC0415 - no dependency
    except ImportError:
        raise ImportError(f"this needs torch: {_INSTALL['torch']}") from None
    return torch.from_numpy(array)
