"""One sequence of a request, text or tensors, to checked model inputs. The request as a whole is in `validation`."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from typing import Final

import numpy as np
from attnserve.v1 import inference_service_pb2, tensor_pb2

from attnserve_server.domain.errors import TextUnavailable, Violations, quoted
from attnserve_server.domain.values import Array, AxisUnits
from attnserve_server.model.formula import broken_relations
from attnserve_server.model.manifest import NUMPY_DTYPES, InputRole, InputSpec, TextSpec
from attnserve_server.model.tokenizer import TextTokenizer, TokenizedText, TruncationFailed
from attnserve_server.transport.intake import (
    CountedPositions,
    Intake,
    counted_from_the_start,
    fits,
    invalid_index,
    invalid_length,
    invalid_value,
)
from attnserve_server.transport.wire import DTYPE_NAMES, Received, array_of

MAX_RANK: Final = 8
MAX_ELEMENTS: Final = 2**63 - 1


@dataclass(slots=True)
class Inputs:
    """One sequence's model inputs, the lengths of its axes, and the units of those that were made from text.

    `past`: positions of its past, 0 without one; `past_labels`: their labels, empty if the caller sent none.
    """

    tensors: dict[str, Array]
    lengths: dict[str, int]
    units: Mapping[str, AxisUnits] = field(default_factory=dict)
    past: int = 0
    past_labels: tuple[str, ...] = ()


class InputReader:
    """Reads the sequences of one request, and collects what is wrong with them."""

    def __init__(
        self, received: Received[inference_service_pb2.InferRequest], intake: Intake, violations: Violations
    ) -> None:
        self._received = received
        self._intake = intake
        self._violations = violations
        self._prompt = self._chosen_prompt(received.message)

    def read(self, sequence: inference_service_pb2.Sequence, path: str) -> Inputs | None:
        """Return one sequence's inputs, or None after adding violations.

        Args:
            sequence: of the request.
            path: the sequence's field path, for violations.

        Raises:
            TextUnavailable: The sequence is text, and the model has no tokenizer.
        """
        kind = sequence.WhichOneof("input")
        if kind == "text":
            return self._from_text(sequence.text, f"{path}.text")
        if kind == "tensors":
            if self._received.message.prompt_name:
                self._violations.add("prompt_name", f"a prompt is put before text, and {path} has tensors: unset it")
            return self._from_tensors(sequence.tensors.tensors, f"{path}.tensors.tensors")
        self._violations.add(path, "neither text nor tensors is set")
        return None

    def _from_tensors(self, messages: Iterable[tensor_pb2.Tensor], path: str) -> Inputs | None:
        before = len(self._violations)
        lengths = dict(self._intake.fixed_lengths)
        tensors, sent = self._arrays(messages, path, lengths)
        for name, spec in self._intake.inputs.items():
            if name not in sent and not spec.optional:
                self._violations.add(path, f"input {name!r} is missing")
        if len(self._violations) > before or not self._fill_in(tensors, lengths, path):
            return None
        return Inputs(tensors, lengths)

    def _from_text(self, message: inference_service_pb2.TextInput, path: str) -> Inputs | None:
        manifest, tokenizer = self._intake.manifest, self._intake.tokenizer
        spec = manifest.text
        if tokenizer is None or spec is None:
            raise TextUnavailable(manifest.name)
        before = len(self._violations)
        self._check_text(message, spec, path)
        if len(self._violations) > before:
            return None
        limits = self._intake.max_tokens
        try:
            tokens = _tokenized(message, spec, tokenizer, limits, self._prompt)
        except TruncationFailed as why:
            self._violations.add(f"{path}.text", f"too long, and the tokenizer cannot cut it: {why}")
            return None
        field_of = {spec.axis: f"{path}.text", spec.pair_axis: f"{path}.text_pair"}
        for axis, found in tokens.items():
            count = len(found.ids)
            if not 1 <= count <= limits[axis]:
                limit = f"exceed {limits[axis]}" if count else "are less than 1"
                self._violations.add(field_of[axis], f"{count} tokens {limit}")
        if len(self._violations) > before:
            return None
        lengths = {**self._intake.fixed_lengths, **{axis: len(found.ids) for axis, found in tokens.items()}}
        tensors, sent = self._arrays(message.tensors, f"{path}.tensors", lengths)
        self._add_tokens(tensors, tokens, field_of)
        if not self._fill_in(tensors, lengths, path, sent) or len(self._violations) > before:
            return None
        return Inputs(tensors, lengths, {axis: found.units for axis, found in tokens.items()})

    def _chosen_prompt(self, message: inference_service_pb2.InferRequest) -> str:
        """Return the prompt that a request names, or the model's default one; empty: none."""
        text = self._intake.manifest.text
        if not message.HasField("prompt_name"):
            return "" if text is None else text.prompts.get(text.default_prompt, "")
        name, prompts = message.prompt_name, {} if text is None else text.prompts
        if name and name not in prompts:
            known = f"the model has {', '.join(prompts)}" if prompts else "the model has none"
            self._violations.add("prompt_name", f"no prompt {quoted(name)}; {known}")
        return prompts.get(name, "")

    def _check_text(self, message: inference_service_pb2.TextInput, spec: TextSpec, path: str) -> None:
        """Check what needs no tokens, so that the cost of a refusal does not grow with the text."""
        if not message.text:
            self._violations.add(f"{path}.text", "empty: at least 1 character is needed")
        if not message.text_pair and spec.pair_axis and spec.pair_start is None:
            missing = f"empty: the model needs a second text, along axis {spec.pair_axis!r}"
            self._violations.add(f"{path}.text_pair", missing)
        most = self._intake.max_text_bytes
        for name, value in (("text", message.text), ("text_pair", message.text_pair)):
            if (size := len(value.encode())) > most:
                self._violations.add(f"{path}.{name}", f"{size} bytes exceed {most}")

    def _add_tokens(
        self, tensors: dict[str, Array], tokens: Mapping[str, TokenizedText], field_of: Mapping[str, str]
    ) -> None:
        """Add the inputs that are made from text. The caller may send none of them as a tensor."""
        for spec in self._intake.manifest.inputs:
            axis = str(spec.shape[0]) if len(spec.shape) == 1 else ""
            made = self._made(spec, tokens[axis]) if axis in tokens else None
            if made is None:
                continue
            if spec.name in tensors:
                twice = f"input {spec.name!r} is made from the text, and came as a tensor too"
                self._violations.add(field_of[axis], twice)
            tensors[spec.name] = made
            if spec.role is not InputRole.ATTENTION_MASK or spec.counted:
                # A tokenizer with more tokens, or more segments, than its model has must not fail a whole batch.
                self._check_values(made, spec, field_of[axis])

    def _made(self, spec: InputSpec, tokens: TokenizedText) -> Array | None:
        """Return an input along a text's axis as the tokens determine it; None if they do not."""
        dtype = NUMPY_DTYPES[spec.dtype]
        if spec.role is InputRole.TOKEN_IDS:
            return np.ascontiguousarray(tokens.ids, dtype)
        if spec.role is InputRole.TOKEN_TYPE_IDS:
            text = self._intake.manifest.text
            types = tokens.type_ids if text is None or text.type_ids else np.zeros_like(tokens.type_ids)
            return np.ascontiguousarray(types, dtype)
        if spec.role is InputRole.ATTENTION_MASK:
            constant = self._intake.constants.get(spec.name)
            if constant is None or spec.fill != int(not spec.inverted) or not tokens.mask.all():
                return np.ascontiguousarray(1 - tokens.mask if spec.inverted else tokens.mask, dtype)
            return constant[: len(tokens.ids)]
        return None

    def _arrays(
        self, messages: Iterable[tensor_pb2.Tensor], path: str, lengths: dict[str, int]
    ) -> tuple[dict[str, Array], set[str]]:
        """Return the valid tensors by input, and the names of all inputs that were sent.

        `lengths`: those that are known; lengths that the tensors determine are added.
        """
        tensors: dict[str, Array] = {}
        sent: set[str] = set()
        for index, message in self._in_order(messages):
            if self._violations.full:
                break
            where = f"{path}[{index}]"
            spec = self._intake.inputs.get(message.name)
            if spec is None:
                takes = ", ".join(self._intake.inputs)
                self._violations.add(f"{where}.name", f"no input {quoted(message.name)}; the model takes {takes}")
            elif spec.name in sent:
                self._violations.add(f"{where}.name", f"input {spec.name!r} is given twice")
            else:
                sent.add(spec.name)
                array = self._array(message, spec, where, lengths)
                if array is not None:
                    tensors[spec.name] = array
        return tensors, sent

    def _in_order(self, messages: Iterable[tensor_pb2.Tensor]) -> Iterable[tuple[int, tensor_pb2.Tensor]]:
        """Return the tensors in the order in which they are checked, each with its index in the message."""
        return enumerate(messages)

    def _array(self, message: tensor_pb2.Tensor, spec: InputSpec, path: str, lengths: dict[str, int]) -> Array | None:
        """Return a read-only view of a tensor's data, which may be unaligned, or None after adding violations."""
        violations = self._violations
        before = len(violations)
        dtype = DTYPE_NAMES.get(message.dtype)
        if dtype != spec.dtype:
            violations.add(f"{path}.dtype", f"{dtype or message.dtype}, but input {spec.name!r} is {spec.dtype}")
        shape: tuple[int, ...] | None = tuple(message.shape) if len(message.shape) == len(spec.shape) else None
        if shape is None or not all(map(fits, shape, spec.shape, repeat(self._intake.max_lengths), repeat(lengths))):
            shape = self._shape(message, spec, path, lengths)
        if shape is None or len(violations) > before:
            return None
        data = self._received.data_of(message)
        size = math.prod(shape) * NUMPY_DTYPES[spec.dtype].itemsize
        if len(data) != size:
            violations.add(f"{path}.data", f"{len(data)} bytes; shape {list(shape)} of {spec.dtype} needs {size}")
            return None
        if spec.dtype == "bool":
            raw = np.frombuffer(data, np.uint8)
            if raw.max() > 1:
                at = int(np.argmax(raw > 1))
                violations.add(f"{path}.data", f"element {at} is byte {raw[at]}; a bool is 0 or 1")
                return None
        array = array_of(data, spec.dtype, shape)
        self._check_values(array, spec, f"{path}.data")
        return array if len(violations) == before else None

    def _shape(
        self, message: tensor_pb2.Tensor, spec: InputSpec, path: str, lengths: dict[str, int]
    ) -> tuple[int, ...] | None:
        """Return the shape, or None after adding what is wrong with it. Allocates nothing."""
        violations = self._violations
        rank = len(message.shape)
        if rank > MAX_RANK:
            violations.add(f"{path}.shape", f"rank {rank} exceeds {MAX_RANK}")
            return None
        shape = tuple(message.shape)
        before = len(violations)
        for axis, length in enumerate(shape):
            if length < 1:
                violations.add(f"{path}.shape[{axis}]", f"length {length} is less than 1")
        if len(violations) > before:
            return None
        if (elements := math.prod(shape)) > MAX_ELEMENTS:
            violations.add(f"{path}.shape", f"{elements} elements exceed {MAX_ELEMENTS}")
            return None
        if rank != len(spec.shape):
            declared = ", ".join(map(str, spec.shape))
            wanted = f"input {spec.name!r} has rank {len(spec.shape)} without batch: [{declared}]"
            violations.add(f"{path}.shape", f"rank {rank}, but {wanted}")
            return None
        for axis, (length, extent) in enumerate(zip(shape, spec.shape, strict=True)):
            invalid = invalid_length(length, extent, self._intake.max_lengths, lengths)
            if invalid:
                violations.add(f"{path}.shape[{axis}]", invalid)
        return shape if len(violations) == before else None

    def _fill_in(
        self, tensors: dict[str, Array], lengths: dict[str, int], path: str, sent: Collection[str] = ()
    ) -> bool:
        """Fill inputs that were left out with their fill values, and check positions; return whether all is valid.

        Those of `sent` that are not among the tensors were invalid, and have their violations.
        """
        before = len(self._violations)
        specs, formulas = self._intake.inputs.values(), self._intake.formulas
        for broken in broken_relations(formulas, specs, tensors, lengths) if formulas else ():
            self._violations.add(path, broken)
        for name, spec in self._intake.inputs.items():
            if name in tensors or name in sent or spec.role is InputRole.POSITION_IDS:
                continue
            constant = self._intake.constants.get(name)
            if constant is not None and spec.shape[0] in lengths:
                tensors[name] = constant[: lengths[str(spec.shape[0])]]
                continue
            unknown = [extent for extent in spec.shape if isinstance(extent, str) and extent not in lengths]
            if not spec.optional:
                self._violations.add(path, f"input {name!r} cannot be made from text: send tensors")
            elif unknown:
                missing = f"input {name!r} is missing, and no other input determines the length of axis {unknown[0]!r}"
                self._violations.add(path, missing)
            else:
                shape = [lengths[extent] if isinstance(extent, str) else extent for extent in spec.shape]
                tensors[name] = np.full(shape, spec.fill, NUMPY_DTYPES[spec.dtype])
        for counted in self._intake.counted:
            self._count(counted, tensors, lengths, path, sent)
        if self._intake.indexes_positions and len(self._violations) == before:
            self._place(tensors, lengths, path)
        for symbol in self._intake.formulas:
            del lengths[symbol]  # from here on it follows from the others
        return len(self._violations) == before

    def _count(
        self,
        counted: CountedPositions,
        tensors: dict[str, Array],
        lengths: Mapping[str, int],
        path: str,
        sent: Collection[str],
    ) -> None:
        """Count the positions of an input that was left out."""
        name, axis = counted.spec.name, counted.axis
        if name in tensors or name in sent:
            return
        if axis not in lengths:
            missing = f"input {name!r} is missing, and no other input determines the length of axis {axis!r}"
            self._violations.add(path, missing)
            return
        tensors[name] = counted.positions(tensors, lengths[axis], lengths.get(counted.keys, lengths[axis]))
        self._check_values(tensors[name], counted.spec, path)

    def _place(self, tensors: dict[str, Array], lengths: Mapping[str, int], path: str) -> None:
        """Check inputs that hold indices of positions, now that lengths are known, and count all from the start."""
        for name, spec in self._intake.inputs.items():
            if name not in tensors or not any(each.along in lengths for each in spec.index_ranges):
                continue
            if invalid := invalid_index(tensors[name], spec, lengths):
                self._violations.add(path, invalid)
            tensors[name] = counted_from_the_start(tensors[name], spec, lengths)

    def _check_values(self, array: Array, spec: InputSpec, path: str) -> None:
        if invalid := invalid_value(array, spec, self._intake.limits[spec.name]):
            self._violations.add(path, invalid)


def _tokenized(
    message: inference_service_pb2.TextInput,
    spec: TextSpec,
    tokenizer: TextTokenizer,
    limits: Mapping[str, int],
    prompt: str,
) -> dict[str, TokenizedText]:
    """Tokenize a text, or a pair on one axis, or two texts that each have an axis; return the tokens by axis."""
    if not spec.pair_axis:
        tokens = tokenizer.encode(message.text, message.text_pair, prompt=prompt, limit=limits[spec.axis])
        return {spec.axis: tokens}
    second = tokenizer.encode_second(
        message.text_pair, spec.pair_axis, start=spec.pair_start, limit=limits[spec.pair_axis]
    )
    return {spec.axis: tokenizer.encode(message.text, prompt=prompt, limit=limits[spec.axis]), spec.pair_axis: second}
