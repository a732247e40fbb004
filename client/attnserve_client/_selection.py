"""The selection of the attention to return, and its encoding to and from the wire."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, TypeAlias, TypeVar, get_args

from attnserve.v1 import attention_pb2 as wire
from attnserve.v1 import tensor_pb2

from attnserve_client.errors import InvalidRequest

HeadReduction = Literal["each", "mean", "max"]
LayerReduction = Literal["each", "mean", "rollout"]
Unit = Literal["token", "word"]
SpecialTokens = Literal["keep", "drop"]
WeightDtype = Literal["float32", "float16", "uint8"]
AttentionValue = Literal["weights", "scores"]
Feature = Literal["entropy", "top1_share", "first_token", "mean_distance"]

_HEADS: Final[dict[str, wire.HeadReduction.ValueType]] = {
    "each": wire.HEAD_REDUCTION_EACH,
    "mean": wire.HEAD_REDUCTION_MEAN,
    "max": wire.HEAD_REDUCTION_MAX,
}
_LAYERS: Final[dict[str, wire.LayerReduction.ValueType]] = {
    "each": wire.LAYER_REDUCTION_EACH,
    "mean": wire.LAYER_REDUCTION_MEAN,
    "rollout": wire.LAYER_REDUCTION_ROLLOUT,
}
_UNITS: Final[dict[str, wire.AttentionUnit.ValueType]] = {
    "token": wire.ATTENTION_UNIT_TOKEN,
    "word": wire.ATTENTION_UNIT_WORD,
}
_SPECIAL: Final[dict[str, wire.SpecialTokens.ValueType]] = {
    "keep": wire.SPECIAL_TOKENS_KEEP,
    "drop": wire.SPECIAL_TOKENS_DROP,
}
_DTYPES: Final[dict[str, tensor_pb2.DataType.ValueType]] = {
    "float32": tensor_pb2.DATA_TYPE_FLOAT32,
    "float16": tensor_pb2.DATA_TYPE_FLOAT16,
    "uint8": tensor_pb2.DATA_TYPE_UINT8,
}
_VALUES: Final[dict[str, wire.AttentionValue.ValueType]] = {
    "weights": wire.ATTENTION_VALUE_WEIGHTS,
    "scores": wire.ATTENTION_VALUE_SCORES,
}
_FEATURES: Final[dict[str, wire.AttentionFeature.ValueType]] = {
    "entropy": wire.ATTENTION_FEATURE_ENTROPY,
    "top1_share": wire.ATTENTION_FEATURE_TOP1_SHARE,
    "first_token": wire.ATTENTION_FEATURE_FIRST_TOKEN,
    "mean_distance": wire.ATTENTION_FEATURE_MEAN_DISTANCE,
}
_V = TypeVar("_V", bound=int)


@dataclass(frozen=True, slots=True)
class AttentionSelection:
    """A selection of attention weights. The defaults select all weights of all sites, unreduced.

    The server applies the fields in this order: sites, heads, layers, words, special tokens, queries, features or
    links, dtype.

    A name or a number alone is a list of one: `layers=-1`.

    Attributes:
        sites: Names of sites, as listed in `ModelInfo.sites`; empty for all.
        layers: Positions of sites in the model's list; negative ones count from the end.
        heads: Indices of heads, negative ones from the end; or `"each"`, `"mean"` or `"max"` over all heads.
        head_reduction: How the heads listed in `heads` are joined.
        layer_reduction: `"each"` site separately, the `"mean"` of the sites, or their `"rollout"`. Source: Abnar and
            Zuidema 2020, section 3.
        queries: Rows to return, as indices of units, special tokens counted; negative ones count from the end.
        unit: Unit of rows and columns, `"token"` or `"word"`.
        special_tokens: `"keep"` special tokens, or `"drop"` them and renormalize the rows to sum 1.
        top_k: Number of weights to keep in each row, the greatest; 0 for all.
        min_weight: Least weight to keep, from 0 to 1; 0 for all.
        dtype: Type in which weights are sent: `"float32"`, `"float16"` (half the bytes), or `"uint8"` (a quarter of the
            bytes, with an error of at most 1/510).
        features: Numbers of each row to return in place of maps, as `InferenceResult.features`: `"entropy"` in nats,
            `"top1_share"` (the greatest weight), `"first_token"` (the weight of the first key), `"mean_distance"` (the
            sum of weight times distance in units). One name, or several.
        values: What maps hold: `"weights"`, or the `"scores"` that softmax makes them of, with `-inf` for hidden keys.

    Raises:
        InvalidRequest: `heads` is an unknown reduction, or another one than `head_reduction`.
        TypeError: A list of names or numbers is neither a list nor one of them.
    """

    sites: Sequence[str] | str = ()
    layers: Sequence[int] | int = ()
    heads: Sequence[int] | HeadReduction | int = ()
    head_reduction: HeadReduction | None = None
    layer_reduction: LayerReduction | None = None
    queries: Sequence[int] | int = ()
    unit: Unit | None = None
    special_tokens: SpecialTokens | None = None
    top_k: int = 0
    min_weight: float = 0.0
    dtype: WeightDtype | None = None
    features: Sequence[Feature] | Feature = ()
    values: AttentionValue | None = None

    def __post_init__(self) -> None:
        for name in ("sites", "layers", "queries", "features"):
            object.__setattr__(self, name, _several(name, getattr(self, name)))
        if isinstance(self.heads, str):
            _choice("heads", self.heads, _HEADS)
            if self.head_reduction not in (None, self.heads):
                problem = f"{self.head_reduction!r} differs from heads {self.heads!r}; set one of them"
                raise InvalidRequest.of("attention.head_reduction", problem)
            object.__setattr__(self, "head_reduction", self.heads)
            object.__setattr__(self, "heads", ())
        object.__setattr__(self, "heads", _several("heads", self.heads))

    def to_wire(self) -> wire.AttentionSelection:
        """Return the message for this selection.

        Raises:
            InvalidRequest: A choice is unknown, or an integer does not fit its field.
            TypeError: A layer, head, query or `top_k` is no integer, a site is no string, or `min_weight` is no number.
        """
        message = wire.AttentionSelection(sites=self.sites)
        message.layers.extend(_integers("layers", _several("layers", self.layers)))
        message.heads.extend(_integers("heads", () if isinstance(self.heads, str) else _several("heads", self.heads)))
        message.queries.extend(_integers("queries", _several("queries", self.queries)))
        if self.head_reduction is not None:
            message.head_reduction = _choice("head_reduction", self.head_reduction, _HEADS)
        if self.layer_reduction is not None:
            message.layer_reduction = _choice("layer_reduction", self.layer_reduction, _LAYERS)
        if self.unit is not None:
            message.unit = _choice("unit", self.unit, _UNITS)
        if self.special_tokens is not None:
            message.special_tokens = _choice("special_tokens", self.special_tokens, _SPECIAL)
        if self.dtype is not None:
            message.dtype = _choice("dtype", self.dtype, _DTYPES)
        if self.values is not None:
            message.values = _choice("values", self.values, _VALUES)
        message.features.extend(_choice(f"features[{at}]", each, _FEATURES) for at, each in enumerate(self.features))
        (message.top_k,) = _integers("top_k", (self.top_k,), least=0, most=2**32 - 1)
        message.min_weight = self.min_weight
        return message

    @classmethod
    def from_wire(cls, message: wire.AttentionSelection) -> AttentionSelection:
        """Return the selection in a message, such as the one that the server reports as applied.

        A choice that this client does not know, of a newer server, becomes None as an unset one does. The weights
        beside it are still valid, so the answer is not refused.
        """
        return cls(
            sites=tuple(message.sites),
            layers=tuple(message.layers),
            heads=tuple(message.heads),
            head_reduction=_named(message.head_reduction, _HEADS, get_args(HeadReduction)),
            layer_reduction=_named(message.layer_reduction, _LAYERS, get_args(LayerReduction)),
            queries=tuple(message.queries),
            unit=_named(message.unit, _UNITS, get_args(Unit)),
            special_tokens=_named(message.special_tokens, _SPECIAL, get_args(SpecialTokens)),
            top_k=message.top_k,
            min_weight=message.min_weight,
            dtype=_named(message.dtype, _DTYPES, get_args(WeightDtype)),
            features=features_of(message),
            values=_named(message.values, _VALUES, get_args(AttentionValue)),
        )


AttentionChoice: TypeAlias = AttentionSelection | Mapping[str, Any] | bool | None
"""What a call takes as its selection of attention: a selection, a dict of its fields, True for all, or none."""


def features_of(message: wire.AttentionSelection) -> tuple[Feature, ...]:
    """Return the names of the features that a message selects, without those that this client does not know."""
    found = (_named(code, _FEATURES, get_args(Feature)) for code in message.features)
    return tuple(name for name in found if name is not None)


def selection_of(attention: AttentionChoice) -> wire.AttentionSelection | None:
    """Return the message for a selection; True selects all attention, False and None select none.

    Raises:
        TypeError: `attention`, or a value in it, has another type.
        InvalidRequest: A field or a choice of the selection is unknown, or an integer does not fit its field.
    """
    if attention is None or attention is False:
        return None
    if attention is True:
        return wire.AttentionSelection()
    if isinstance(attention, Mapping):
        check_fields("attention", attention, AttentionSelection)
        attention = AttentionSelection(**attention)
    if isinstance(attention, AttentionSelection):
        return attention.to_wire()
    kind = type(attention).__name__
    raise TypeError(f"attention must be an AttentionSelection, a dict of its fields, a bool or None, not {kind}")


def check_fields(argument: str, given: Mapping[str, Any], kind: type) -> None:
    """Check the names in a dict given as a selection.

    Raises:
        InvalidRequest: `kind` has no such field.
    """
    known = [each.name for each in fields(kind)]
    for name in given:
        if name not in known:
            raise InvalidRequest.of(f"{argument}.{name}", f"a selection has no such field: use {', '.join(known)}")


def _several(field: str, given: Any) -> tuple[Any, ...]:
    """Return a tuple of names or numbers, of which one may stand alone."""
    if isinstance(given, str):
        return (given,)
    if isinstance(given, Iterable):
        return tuple(given)
    try:
        return (operator.index(given),)
    except TypeError:
        raise TypeError(f"attention.{field} is {given!r}; it must be a list, or one of its members") from None


def _integers(field: str, values: Sequence[int], least: int = -(2**31), most: int = 2**31 - 1) -> list[int]:
    checked = []
    for position, value in enumerate(values):
        where = f"attention.{field}" if field == "top_k" else f"attention.{field}[{position}]"
        try:
            number = operator.index(value)
        except TypeError:
            raise TypeError(f"{where} is {value!r}; it must be an integer") from None
        if not least <= number <= most:
            raise InvalidRequest.of(where, f"{number} is not from {least} to {most}")
        checked.append(number)
    return checked


def _choice(field: str, value: str, known: dict[str, _V]) -> _V:
    if value not in known:
        raise InvalidRequest.of(f"attention.{field}", f"{value!r} is not one of {', '.join(known)}")
    return known[value]


_N = TypeVar("_N", bound=str)


def _named(code: int, known: dict[str, _V], names: tuple[_N, ...]) -> _N | None:
    return next((name for name in names if known[name] == code), None)
