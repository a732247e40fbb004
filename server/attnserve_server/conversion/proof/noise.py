"""How far answers differ by rounding alone: among batch shapes and places, with identical neighbours.

The noise widens the rule of equality, so it must not include a real dependency on the batch, such as a scale that
follows the number of rows. Therefore it is bounded: a difference beyond a small multiple of the precision's floor
counts as no noise at all. The attack then finds the difference, and refutes the batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
import onnx
import onnx.numpy_helper

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.tolerances import max_abs
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.proof.answers import Answer
from attnserve_server.conversion.proof.target import Target
from attnserve_server.domain.values import Array
from attnserve_server.model.equality import WEIGHTS_PREFIX, Equality
from attnserve_server.model.manifest import NUMPY_DTYPES

_LENGTHS: Final = (3, 16, 61, 128)
_BATCHES: Final = (2, 5, 8)
_MANY_TOKENS: Final = 320
_MOST_FLOORS: Final[Mapping[str, float]] = MappingProxyType({"fp32": 10.0, "fp16": 2.0, "bf16": 3.0, "int8": 2.0})
"""The maximum noise, as a multiple of the precision's floor. float32's floor is small, and sums over thousands of terms
reach a few times it. The others have more headroom in the floor itself. bf16: providers that round scores reach 6e-2
of weights."""
_MOST_AMPLIFIED: Final = 0.1
"""The maximum noise that changes of last bits alone may show: that of golden answers in int8."""
_LAST_BITS: Final = 16.0
"""Rounding may move an answer this many times as far as a change of the last bit of its inputs: a graph rounds
often."""
_CANCELLED: Final = 32.0
"""Rounding of the usual values is below their floor divided by this. An answer far smaller than usual may be rounding
only."""


def noise_of(target: Target, precision: str, moved: GraphRunner | None = None) -> dict[str, float]:
    """Measure how much a sequence's answer differs from its answer alone, in batches of copies of itself.

    The copies are unpadded and of equal lengths, so only the batch's shape and the row's place differ. Lengths and
    batches that the graph does not take are skipped.

    Constant quantizers amplify rounding: a last bit moves a number by a whole step, and later numbers by more. Answers
    of sequences alone, which no neighbour can change, show by how much.

    Args:
        target: The model.
        precision: The precision that the graph computes in: `fp32`, `fp16`, `bf16` or `int8`, else KeyError.
        moved: The graph with other last bits of its constants (`with_other_last_bits`). None: rounding is not
            amplified.

    Returns:
        The noise by output name, relative to the output's greatest value, and by `attention.<site>`, as an absolute
        difference of weights. Entries without noise, and those beyond the bound, are left out.
    """
    names, runner, sampler = target.fetched, target.runner, target.sampler
    worst, alone_worst = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    longest = max(target.max_lengths.values(), default=1)
    for length in dict.fromkeys(min(length, longest) for length in _LENGTHS):
        lengths = {symbol: min(length, most) for symbol, most in target.max_lengths.items()}
        sequence = sampler.sequence(lengths, length)
        sizes = (size for size in _BATCHES if size <= target.rows and size * length <= _MANY_TOKENS)
        # The graph may take no such lengths, or no such batch.
        with contextlib.suppress(BuildRefused):
            alone = runner.run(sampler.batch([sequence], lengths), list(names.values()))
            if moved is not None:
                other = moved.run(sampler.batch([sequence], lengths), list(names.values()))
                for name, output in names.items():
                    alone_worst[name] = max(alone_worst[name], _noise(name, other[output], alone[output][0]))
            for size in sizes:
                copies = runner.run(sampler.batch([sequence] * size, lengths), list(names.values()))
                for name, output in names.items():
                    worst[name] = max(worst[name], _noise(name, copies[output], alone[output][0]))
    floors = Equality(precision)
    amplified = {name: noise if noise <= _MOST_AMPLIFIED else 0.0 for name, noise in alone_worst.items()}
    found: dict[str, float] = {}
    for name, noise in worst.items():
        most = max(_MOST_FLOORS[precision] * floors.allowed(name, np.ones(1)), amplified[name])
        found[name] = max(noise if noise <= most else 0.0, amplified[name])
    return {name: float(f"{noise:.3g}") for name, noise in found.items() if noise > 0}


def with_other_last_bits(proto: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """Return a copy of a model in which the last bits of its float32 constants of several numbers are changed.

    Such constants are gains, biases, tables and scales of channels. Single numbers are bounds, exponents and masks.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    rng = np.random.default_rng(seed)
    for tensor in changed.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and math.prod(tensor.dims) > 1:
            array = onnx.numpy_helper.to_array(tensor)
            bits = rng.integers(-1, 2, array.shape) * float(np.finfo(np.float32).eps)
            tensor.CopyFrom(
                onnx.numpy_helper.from_array((array.astype(np.float64) * (1 + bits)).astype(np.float32), tensor.name)
            )
    return changed


def shaken(sampler: Sampler, sequence: Mapping[str, Array], seed: int) -> dict[str, Array] | None:
    """Return the sequence with the last bits of its floats changed at random, or None where it has none to change."""
    rng = np.random.default_rng([sampler.seed, seed])
    changed: dict[str, Array] = dict(sequence)
    for spec in sampler.signature.inputs:
        array = sequence[spec.name]
        if np.issubdtype(NUMPY_DTYPES[spec.dtype], np.floating) and spec.fill is None:
            bits = rng.integers(-1, 2, array.shape) * float(np.finfo(array.dtype.name).eps)
            changed[spec.name] = (array.astype(np.float64) * (1 + bits)).astype(array.dtype)
    moved = any(not np.array_equal(changed[name], array) for name, array in sequence.items())
    return changed if moved else None


def is_rounding(
    found: Answer, reference: Answer, equality: Equality, *, shaken: Iterable[Answer], usual: Mapping[str, float]
) -> bool:
    """Return whether a sequence is so ill-conditioned that rounding explains its difference.

    For example, its scores are millions and two of them tie, so its answer alone changes as much with the last bits of
    its inputs. Or its answer is what remains where far larger values cancel.

    Args:
        found: Its answer in a batch.
        reference: Its answer alone.
        equality: The rule of equality. Only unequal outputs need an explanation.
        shaken: Its answers alone after changes of the last bits.
        usual: The greatest value of each output in sequences of ordinary values.
    """
    answers = list(shaken)
    for name, array in reference.items():
        if equality.error(name, found[name], array) <= 1:
            continue
        moved = max((max_abs(answer[name], array) for answer in answers), default=0.0)
        cancelled = equality.allowed(name, np.ones(1)) * usual.get(name, 0.0)
        if not max_abs(found[name], array) <= max(_LAST_BITS * moved, cancelled / _CANCELLED) < np.inf:
            return False
    return True


def _noise(name: str, copies: Array, alone: Array) -> float:
    """Return the greatest difference of any copy, in the unit of the certificate's noise."""
    difference = max_abs(copies, np.broadcast_to(alone, copies.shape))
    if name.startswith(WEIGHTS_PREFIX):
        return difference
    finite = np.abs(alone.astype(np.float64))
    greatest = float(finite[np.isfinite(finite)].max(initial=0.0))
    return difference / greatest if greatest else (np.inf if difference else 0.0)
