"""One sequence with a past to checked inputs of the continuing graph. Sequences without one are read by `inputs`.

All cache inputs must be there, of one past length P, and with a mask, if one is sent, of P + T positions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from attnserve.v1 import inference_service_pb2, tensor_pb2

from attnserve_server.attention.resolve import require_outputs
from attnserve_server.domain.errors import Violations, quoted
from attnserve_server.domain.values import Array, EffectiveSelection, LayerReduction
from attnserve_server.model.manifest import InputSpec
from attnserve_server.model.past import PastSpec
from attnserve_server.transport.inputs import InputReader, Inputs
from attnserve_server.transport.intake import Intake
from attnserve_server.transport.wire import Received


class ContinuedReader(InputReader):
    """Reads those sequences of one request that have a past."""

    def __init__(
        self,
        received: Received[inference_service_pb2.InferRequest],
        intake: Intake,
        past: PastSpec,
        violations: Violations,
    ) -> None:
        """Read by `intake`, which is that of the continuing graph."""
        super().__init__(received, intake, violations)
        self._past = past
        self._caches = past.cache_names

    def takes(self, sequence: inference_service_pb2.Sequence) -> bool:
        """Return whether a sequence has a past: whether it has a cache input."""
        tensors = sequence.text.tensors if sequence.WhichOneof("input") == "text" else sequence.tensors.tensors
        return any(tensor.name in self._caches for tensor in tensors)

    def read(self, sequence: inference_service_pb2.Sequence, path: str) -> Inputs | None:
        """Return one sequence's inputs with its past's length and labels, or None after adding violations."""
        inputs = super().read(sequence, path)
        if inputs is None:
            return None
        count, labels = inputs.lengths[self._past.axis], tuple(sequence.past_tokens)
        if labels and len(labels) != count:
            wrong = f"{len(labels)} labels for {count} past positions: send one for each, or none"
            self._violations.add(f"{path}.past_tokens", wrong)
            return None
        # Both lengths determine that of the keys, which does not count as more tokens.
        lengths = {symbol: length for symbol, length in inputs.lengths.items() if symbol != self._past.key_axis}
        return replace(inputs, lengths=lengths, past=count, past_labels=labels)

    def _in_order(self, messages: Iterable[tensor_pb2.Tensor]) -> Iterable[tuple[int, tensor_pb2.Tensor]]:
        """Masks last: their length is checked against those of the past and of the new positions."""
        along = {spec.name for spec in self._past.inputs if self._past.key_axis in spec.shape}
        return sorted(enumerate(messages), key=lambda one: one[1].name in along)

    def _arrays(
        self, messages: Iterable[tensor_pb2.Tensor], path: str, lengths: dict[str, int]
    ) -> tuple[dict[str, Array], set[str]]:
        tensors, sent = super()._arrays(messages, path, lengths)
        given = len(self._caches & sent)
        for cache in self._past.caches:
            if cache.input.name not in sent:
                few = f"cache input {cache.input.name!r} is missing: {given} of {len(self._caches)} are sent"
                self._violations.add(path, f"{few}; send all of them, or none for an empty past")
        return tensors, sent | self._caches

    def _array(self, message: tensor_pb2.Tensor, spec: InputSpec, path: str, lengths: dict[str, int]) -> Array | None:
        if spec.name in self._caches and self._past.axis in spec.shape and 0 in message.shape:
            empty = f"shape {list(message.shape)} has no positions; leave all cache inputs out for an empty past"
            self._violations.add(f"{path}.shape", empty)
            return None
        total = self._total(lengths)
        if self._past.key_axis in spec.shape and total is not None and len(message.shape) == len(spec.shape):
            at = spec.shape.index(self._past.key_axis)
            if message.shape[at] != total:
                parts = f"{lengths[self._past.axis]} past and {lengths[self._past.follows]} new positions"
                remedy = f"; leave {spec.name!r} out to have it filled" if spec.fill is not None else ""
                self._violations.add(f"{path}.shape[{at}]", f"length {message.shape[at]} for {parts}{remedy}")
                return None
        return super()._array(message, spec, path, lengths)

    def _fill_in(
        self, tensors: dict[str, Array], lengths: dict[str, int], path: str, sent: Collection[str] = ()
    ) -> bool:
        total, longest = self._total(lengths), self._intake.max_lengths[self._past.key_axis]
        if total is not None and total > longest:
            parts = f"{lengths[self._past.axis]} past and {lengths[self._past.follows]} new positions"
            self._violations.add(path, f"{parts} exceed {longest} of axis {self._past.follows!r}")
            return False
        if total is not None:
            lengths[self._past.key_axis] = total
        return super()._fill_in(tensors, lengths, path, sent)

    def _total(self, lengths: Mapping[str, int]) -> int | None:
        """P + T; None while one of them is not known."""
        return self._intake.manifest.with_derived(lengths).get(self._past.key_axis)


def check_continued(
    found: Sequence[Inputs],
    outputs: tuple[str, ...],
    effective: EffectiveSelection | None,
    continuing: Intake,
    violations: Violations,
) -> None:
    """Check what sequences with a past cannot be answered with: what the prompt graph alone returns, and rollout.

    Raises:
        AttentionUnavailable: Scores are selected of a site whose scores the prompt graph alone returns.
    """
    index = next((index for index, inputs in enumerate(found) if inputs.past), None)
    if index is None:
        return
    for position, name in enumerate(outputs):
        if name not in continuing.output_sizes:
            has = ", ".join(continuing.output_sizes)
            missing = f"no output {quoted(name)} after a past, which sequences[{index}] has; there are {has}"
            violations.add(f"outputs.names[{position}]", missing)
    if effective is None:
        return
    manifest = continuing.manifest
    require_outputs(manifest.name, [manifest.sites[layer] for layer in effective.layers], effective.values)
    if effective.layer_reduction is LayerReduction.ROLLOUT:
        past = f"sequences[{index}] has {found[index].past} past positions, which are keys and no queries"
        violations.add("attention.layer_reduction", f"rollout needs equal queries and keys; {past}: take each or mean")
