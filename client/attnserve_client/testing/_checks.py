"""What the fake server refuses: the fields and words of a server, for the requests that both can refuse.

tests/contract/test_fake_refusals.py sends each of them to a server too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from attnserve.v1 import attention_pb2, tensor_pb2
from attnserve.v1 import inference_service_pb2 as wire

from attnserve_client._selection import AttentionSelection
from attnserve_client.errors import AttentionUnavailable, FieldViolation, InvalidRequest
from attnserve_client.testing._answers import AXIS, Shape

MAX_BATCH: Final = 64
MAX_REQUEST_ID: Final = 128
MAX_NAMES: Final = 20
MAX_QUOTED: Final = 64
_CHOICES: Final = {
    "head_reduction": attention_pb2.HeadReduction.values(),
    "layer_reduction": attention_pb2.LayerReduction.values(),
    "unit": attention_pb2.AttentionUnit.values(),
    "special_tokens": attention_pb2.SpecialTokens.values(),
    "dtype": [0, tensor_pb2.DATA_TYPE_UINT8, tensor_pb2.DATA_TYPE_FLOAT16, tensor_pb2.DATA_TYPE_FLOAT32],
    "values": attention_pb2.AttentionValue.values(),
}
_FEATURES: Final = [number for number in attention_pb2.AttentionFeature.values() if number]


def quoted(text: str) -> str:
    """Quote a caller's text for a message: escaped to ASCII, cut to 64 characters."""
    return ascii(text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "...")


class Violations:
    """Collects what is wrong with one request, so that one answer reports all of it."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        """Add one."""
        self._found.append(FieldViolation(field, description))

    def add_once(self, field: str, description: str) -> None:
        """Add one, unless the field has one already."""
        if all(known.field != field for known in self._found):
            self.add(field, description)

    def extend(self, other: Violations) -> None:
        """Add those of another."""
        self._found += other._found

    def __bool__(self) -> bool:
        return bool(self._found)

    def raise_any(self) -> None:
        """Raise InvalidRequest with all of them, if there are any."""
        if self._found:
            raise InvalidRequest(
                "; ".join(f"{one.field}: {one.description}" for one in self._found),
                code="INVALID_ARGUMENT",
                reason="INVALID_REQUEST",
                violations=tuple(self._found),
            )


def check_reference(request: wire.InferRequest) -> None:
    """Refuse a request without a model's name, or with an id that may not be echoed. Raises InvalidRequest."""
    found = Violations()
    if request.request_id:
        size = len(request.request_id)
        shown = quoted(request.request_id)
        if size > MAX_REQUEST_ID:
            found.add("request_id", f"{size} characters exceed {MAX_REQUEST_ID}: {shown}")
        elif not (request.request_id.isascii() and request.request_id.isprintable()):
            found.add("request_id", f"not printable ASCII: {shown}")
    found.raise_any()
    if not request.model:
        found.add("model", "empty: a model's name is needed")
    found.raise_any()


def check_request(request: wire.InferRequest, shape: Shape) -> None:
    """Refuse what needs no tokens.

    Args:
        request: To a model that is served.
        shape: The model's.

    Raises:
        InvalidRequest: With everything that is wrong.
        AttentionUnavailable: Attention is selected, and the model has no sites.
    """
    found = Violations()
    _one_of(found, "priority", request.priority, wire.Priority.values())
    if request.HasField("attention"):
        _check_selection(found, request.attention, shape, request.model)
    for position, name in enumerate(request.outputs.names):
        if name not in shape.outputs:
            known = ", ".join(shape.outputs)
            found.add(f"outputs.names[{position}]", f"no output {quoted(name)}; the model has {known}")
    if request.HasField("labels") and not shape.labels:
        found.add("labels", f"model {request.model!r} has no head that gives labels: leave labels unset")
    if not 1 <= (count := len(request.sequences)) <= MAX_BATCH:
        found.add("sequences", f"{count} sequences {f'exceed {MAX_BATCH}' if count else 'are less than 1'}")
    elif request.prompt_name:
        found.add("prompt_name", f"no prompt {quoted(request.prompt_name)}; the model has none")
    for position, sequence in enumerate(request.sequences):
        _check_sequence(found, f"sequences[{position}]", sequence)
    found.raise_any()


def check_queries(queries: Sequence[int], length: int, unit: str, sequence: int) -> None:
    """Refuse queries beyond a sequence of this many units, or that name a row again. Raises InvalidRequest."""
    found, seen = Violations(), dict[int, int]()
    where = f"of sequence {sequence} along axis {AXIS!r}"
    for position, query in enumerate(queries):
        if not -length <= query < length:
            limit = f"it has {length} {unit}s: -{length} to {length - 1}"
            found.add(f"attention.queries[{position}]", f"query {query} is out of range {where}; {limit}")
        elif query % length in seen:
            again = f"query {query} is the same row {where} as query {seen[query % length]}"
            found.add(f"attention.queries[{position}]", again)
        else:
            seen[query % length] = query
    found.raise_any()


def _check_sequence(found: Violations, path: str, sequence: wire.Sequence) -> None:
    if sequence.past_tokens:
        without = f"{len(sequence.past_tokens)} labels for a sequence without a past: leave them out"
        found.add(f"{path}.past_tokens", without)
    kind = sequence.WhichOneof("input")
    if kind is None:
        found.add(path, "neither text nor tensors is set")
    elif kind == "text" and not sequence.text.text:
        found.add(f"{path}.text.text", "empty: at least 1 character is needed")
    elif kind == "text" and sequence.text.tensors:
        unknown = f"no input {quoted(sequence.text.tensors[0].name)}; the model takes input_ids"
        found.add(f"{path}.text.tensors[0].name", unknown)


def _check_selection(all_found: Violations, sent: attention_pb2.AttentionSelection, shape: Shape, model: str) -> None:
    found = Violations()
    for name, known in _CHOICES.items():
        _one_of(found, f"attention.{name}", getattr(sent, name), known)
    for position, number in enumerate(sent.features):
        _one_of(found, f"attention.features[{position}]", number, _FEATURES)
    if not found:
        if not shape.layers:
            raise AttentionUnavailable(
                f"model {model!r}: it has no attention sites",
                code="FAILED_PRECONDITION",
                reason="ATTENTION_UNAVAILABLE",
                metadata={"model": model},
            )
        _check_places(found, sent, shape)
        _check_numbers(found, sent)
        _check_features(found, AttentionSelection.from_wire(sent))
    all_found.extend(found)


def _check_places(found: Violations, sent: attention_pb2.AttentionSelection, shape: Shape) -> None:
    count, heads = shape.layers, shape.heads
    hint = f"; the model's sites are {', '.join(shape.sites[:MAX_NAMES])}{', ...' if count > MAX_NAMES else ''}"
    for position, name in enumerate(sent.sites):
        if name not in shape.sites:
            found.add(f"attention.sites[{position}]", f"no site {quoted(name)}{hint}")
            hint = ""
    for position, layer in enumerate(sent.layers):
        if not -count <= layer < count:
            limit = f"the model has {count} sites: -{count} to {count - 1}"
            found.add(f"attention.layers[{position}]", f"layer {layer} is out of range; {limit}")
    seen: set[int] = set()
    for position, head in enumerate(sent.heads):
        first = shape.sites[0]
        if not -heads <= head < heads:
            limit = f"site {first!r} has {heads} heads: -{heads} to {heads - 1}"
            found.add(f"attention.heads[{position}]", f"head {head} is out of range; {limit}")
        elif head % heads in seen:
            again = f"head {head} names head {head % heads} of site {first!r} again"
            found.add(f"attention.heads[{position}]", again)
        seen.add(head % heads)


def _check_numbers(found: Violations, sent: attention_pb2.AttentionSelection) -> None:
    seen: set[int] = set()
    for position, query in enumerate(sent.queries):
        if query in seen:
            found.add(f"attention.queries[{position}]", f"query {query} is named again")
        seen.add(query)
    if not (math.isfinite(sent.min_weight) and 0 <= sent.min_weight <= 1):
        found.add("attention.min_weight", f"{sent.min_weight!r} is not from 0 to 1")
    each = sent.head_reduction == attention_pb2.HEAD_REDUCTION_EACH
    if each and sent.layer_reduction == attention_pb2.LAYER_REDUCTION_ROLLOUT:
        found.add("attention.head_reduction", "each head by itself has no rollout: take mean or max")


def _check_features(found: Violations, selection: AttentionSelection) -> None:
    """Add a violation for each repeated feature, and for each field without a meaning for features or scores."""
    for position, name in enumerate(selection.features):
        if name in selection.features[:position]:
            found.add(f"attention.features[{position}]", f"{name} is named again")
    top_k, min_weight = bool(selection.top_k), bool(selection.min_weight)
    if selection.features:
        whole = "features are of whole rows"
        excluded = {
            "head_reduction": (selection.head_reduction not in (None, "each"), "features are of each head"),
            "layer_reduction": (selection.layer_reduction not in (None, "each"), "features are of each site"),
            "top_k": (top_k, whole),
            "min_weight": (min_weight, whole),
            "dtype": (selection.dtype not in (None, "float32"), "features are float32"),
        }
        for name, (is_set, why) in excluded.items():
            if is_set:
                value = getattr(selection, name)
                found.add_once(f"attention.{name}", f"{value} is for maps, and {why}; leave it unset")
    if selection.values == "scores":
        links = "links are of weights"
        excluded = {
            "layer_reduction": (selection.layer_reduction == "rollout", "rollout multiplies weights"),
            "unit": (selection.unit == "word", "scores of the pieces of a word have no sum"),
            "top_k": (top_k, links),
            "min_weight": (min_weight, links),
            "dtype": (selection.dtype == "uint8", "uint8 is for numbers from 0 to 1"),
            "features": (bool(selection.features), "features are of weights"),
        }
        for name, (is_set, why) in excluded.items():
            if is_set:
                found.add_once(f"attention.{name}", f"it cannot be selected with scores: {why}; leave it unset")


def _one_of(found: Violations, field: str, number: int, known: Any) -> None:
    if number not in known:
        found.add(field, f"{number} is not one of {', '.join(map(str, sorted(known)))}")
