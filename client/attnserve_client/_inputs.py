"""The inputs that callers may pass, and their encoding as requests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from attnserve.v1 import inference_service_pb2 as wire

from attnserve_client._labels import LabelChoice
from attnserve_client._labels import selection_of as label_selection_of
from attnserve_client._models import ModelInfo
from attnserve_client._selection import AttentionChoice, selection_of
from attnserve_client._tensors import to_tensor
from attnserve_client.errors import InvalidRequest

TokenIds: TypeAlias = "list[int] | npt.NDArray[Any]"
Arrays: TypeAlias = "Mapping[str, npt.ArrayLike]"
Text: TypeAlias = "str | tuple[str, str] | tuple[str, Arrays] | tuple[str, str, Arrays]"
PlainInput: TypeAlias = "Text | TokenIds | Arrays"
"""One sequence, without the batch axis: a text, a pair of texts, token ids, or an array for each input of the model.

Arrays by name may follow one or two texts, for inputs that are not text, such as the pixels of an image.
"""
Input: TypeAlias = "PlainInput | Continuation"
"""One sequence: a `PlainInput`, or one that continues after a past."""
Inputs: TypeAlias = "Input | Sequence[Input]"
Priority = Literal["low", "normal", "high"]

_PRIORITIES: Final[dict[str, wire.Priority.ValueType]] = {
    "low": wire.PRIORITY_LOW,
    "normal": wire.PRIORITY_NORMAL,
    "high": wire.PRIORITY_HIGH,
}
DEFAULT_TOKEN_INPUT: Final = "input_ids"  # noqa: S105 - the name of an input, no secret


@dataclass(frozen=True, slots=True, eq=False)
class Continuation:
    """One sequence that continues after a past, for a decoder with a cache.

    Its attention maps have the new positions as queries, and past and new positions as keys.

    Attributes:
        input: The new positions: a text, token ids, or arrays by input name.
        past: Keys and values of the past positions: an array for each cache input of the model, by name, without the
            batch axis. `ModelInfo.past` lists these inputs, and makes them from the outputs of an earlier call.
        past_tokens: Text of each past position, for the keys of maps; empty for `past[0]`, `past[1]`, and so on.
    """

    input: PlainInput
    past: Arrays
    past_tokens: Sequence[str] = ()


def split(inputs: Inputs) -> tuple[list[Input], bool]:
    """Return the sequences of a call, and whether the caller passed several.

    A text, a tuple of texts and arrays, a list of integers, an array of rank 1, a mapping and a `Continuation` are one
    sequence. Any other list, and an array of a higher rank, are several.

    Raises:
        TypeError: `inputs` has another type.
    """
    if isinstance(inputs, str | tuple | Mapping | Continuation):
        return [inputs], False
    if isinstance(inputs, np.ndarray):
        return ([inputs], False) if inputs.ndim < 2 else (list(inputs), True)
    if isinstance(inputs, list):
        one = bool(inputs) and all(isinstance(each, int | np.integer) for each in inputs)
        return ([cast("Input", inputs)], False) if one else (cast("list[Input]", list(inputs)), True)
    raise _not_an_input(inputs)


def takes_ids(inputs: Iterable[Input]) -> bool:
    """Return whether an input is bare token ids, which need the name and type of the model's input."""
    plain = (each.input if isinstance(each, Continuation) else each for each in inputs)
    return any(isinstance(each, list | np.ndarray) for each in plain)


def sequence_of(one: Input, model: ModelInfo | None) -> wire.Sequence:
    """Return the message for one sequence.

    Args:
        one: The input.
        model: Description of the model, which bare token ids need. None assumes the input `input_ids`, int64.

    Raises:
        TypeError: The type is no input.
        InvalidRequest: The input does not fit the model, or its element type is not in the contract.
    """
    if isinstance(one, Continuation):
        return _continued(one, model)
    if isinstance(one, str):
        return wire.Sequence(text=wire.TextInput(text=_text(one)))
    if isinstance(one, tuple):
        given: tuple[Any, ...] = one  # callers without a type checker pass anything
        *texts, last = given if given and isinstance(given[-1], Mapping) else (*given, {})
        if len(given) < 2 or not 1 <= len(texts) <= 2 or not all(isinstance(text, str) for text in texts):
            raise TypeError("a tuple must be one or two texts, then arrays by name; pass token ids as a list or array")
        first, second = (_text(text) for text in (*texts, "")[:2])
        tensors = [to_tensor(name, np.asarray(value)) for name, value in last.items()]
        return wire.Sequence(text=wire.TextInput(text=first, text_pair=second, tensors=tensors))
    if isinstance(one, Mapping):
        tensors = [to_tensor(name, np.asarray(value)) for name, value in one.items()]
        return wire.Sequence(tensors=wire.TensorInput(tensors=tensors))
    if isinstance(one, list | np.ndarray):
        name = DEFAULT_TOKEN_INPUT if model is None else _token_input(model)
        ids = _ids(name, one, model.input_dtype(name) if model is not None else None)
        return wire.Sequence(tensors=wire.TensorInput(tensors=[to_tensor(name, ids)]))
    raise _not_an_input(one)


def _continued(one: Continuation, model: ModelInfo | None) -> wire.Sequence:
    if not one.past:
        raise InvalidRequest.of("past", "no arrays: pass one for each cache input, or the input alone without a past")
    if isinstance(one.past_tokens, str):
        raise TypeError(f"past_tokens must be a list of texts, not the text {one.past_tokens!r}")
    message = sequence_of(one.input, model)
    given = message.text if message.WhichOneof("input") == "text" else message.tensors
    given.tensors.extend(to_tensor(name, np.asarray(value)) for name, value in one.past.items())
    message.past_tokens.extend(one.past_tokens)
    return message


def request_of(  # noqa: PLR0913 - the fields of the message
    *,
    model: str,
    version: str,
    sequences: Iterable[wire.Sequence],
    outputs: Sequence[str] | None,
    attention: AttentionChoice,
    priority: str,
    request_id: str,
    validate_only: bool,
    labels: LabelChoice = None,
    prompt_name: str | None = None,
) -> wire.InferRequest:
    """Return the message for a call.

    Raises:
        TypeError: `outputs` is one name instead of a list, or a selection or a value in one has another type.
        InvalidRequest: A choice is unknown, or an integer does not fit its field.
    """
    if priority not in _PRIORITIES:
        raise InvalidRequest.of("priority", f"{priority!r} is not one of {', '.join(_PRIORITIES)}")
    if isinstance(outputs, str):
        raise TypeError(f"outputs must be a list of names, not the name {outputs!r}; pass [{outputs!r}]")
    return wire.InferRequest(
        model=model,
        version=str(version),
        sequences=sequences,
        outputs=None if outputs is None else wire.OutputSelection(names=outputs),
        attention=selection_of(attention),
        labels=label_selection_of(labels),
        prompt_name=prompt_name,
        priority=_PRIORITIES[priority],
        validate_only=validate_only,
        request_id=request_id,
    )


def check_timeout(timeout: float | None) -> None:
    """Check that a timeout is None or a positive number of seconds.

    Raises:
        InvalidRequest: It is zero, negative, infinite or NaN.
    """
    if timeout is not None and not (timeout > 0 and math.isfinite(timeout)):
        raise InvalidRequest.of("timeout", f"{timeout} is not a positive number of seconds; pass None for no limit")


def _not_an_input(value: object) -> TypeError:
    kind = type(value).__name__
    return TypeError(f"an input must be text, a pair of texts, token ids, arrays by name or a Continuation, not {kind}")


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"character {error.start} is a lone surrogate, which UTF-8 cannot encode; remove it"
        raise InvalidRequest.of("text", problem) from None
    return text


def _token_input(model: ModelInfo) -> str:
    name = model.token_input
    if name is None:
        names = ", ".join(spec.name for spec in model.inputs)
        problem = f"the model has no single input for token ids; pass a dict with arrays for: {names}"
        raise InvalidRequest.of("inputs", problem)
    return name


def _ids(name: str, ids: Any, dtype: str | None) -> npt.NDArray[Any]:
    array = np.asarray(ids)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        problem = f"token ids must be integers of rank 1, not {array.dtype} of rank {array.ndim}"
        raise InvalidRequest.of(name, problem)
    target = np.dtype(dtype if dtype in ("int32", "int64") else "int64")
    bounds = np.iinfo(target)
    if array.size:
        least, greatest = int(array.min()), int(array.max())
        if not bounds.min <= least <= greatest <= bounds.max:
            raise InvalidRequest.of(name, f"token ids from {least} to {greatest} do not fit the model's {target}")
    return array.astype(target, copy=False)
