"""Compares answers to sequences that continue after a past (keys and values of earlier positions), for decoders.

A case is a file of another tool with its sequences and known answers. Each sequence is cut in two. The server's own
keys and values of the first half are the past of the second, whose answers must be those of the whole sequence, or,
where the file rounds, of the file itself with this past. The client's errors are raised if the server does not answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from attnserve_client import AsyncClient, AttentionSelection, InferenceResult
from attnserve_client.data_types import Continuation, Past

from bench.foreign.case import Array, Case

Run = Callable[[Mapping[str, Array]], dict[str, Array]]


@dataclass(frozen=True, slots=True)
class Halves:
    """One sequence in two parts.

    Attributes:
        number: its place in the case.
        whole: inputs of all positions.
        first: inputs of the first P positions.
        second: inputs of the others; those over past and new positions are whole.
        past: P.
    """

    number: int
    whole: dict[str, Array]
    first: dict[str, Array]
    second: dict[str, Array]
    past: int


async def after_a_past(
    client: AsyncClient, case: Case, past: Past, sequences: Sequence[dict[str, Array]], run: Run, limit_s: float
) -> tuple[list[InferenceResult], list[dict[str, Array]], list[dict[str, Array]]]:
    """Answer the second half of each sequence after the first, each alone and all at once.

    Args:
        client: of the server.
        case: its sources' answers are cut as its sequences.
        past: of the served model.
        sequences: the case's, with the file's own names.
        run: answers inputs by the file itself, without the batch axis.
        limit_s: the time limit of a call.

    Returns:
        The server's results, and, for each, the right outputs and the right weights by layer; no weights where the
        source's are not known.
    """
    axes = {spec.name: spec.shape for spec in past.inputs}
    halves = [_halves(number, each, axes, past) for number, each in enumerate(sequences)]
    given: list[Continuation] = []
    for half in halves:
        begun = await client.infer(case.name, half.first, outputs=list(past.presents), timeout=limit_s)
        given.append(Continuation(half.second, past.after(begun.outputs)))
    selection = AttentionSelection()
    alone = [await client.infer(case.name, each, attention=selection, timeout=limit_s) for each in given]
    together = await client.infer(case.name, given, attention=selection, timeout=limit_s)
    outputs = [_outputs(case, past, half, each, run) for half, each in zip(halves, given, strict=True)]
    weights = [
        {layer: array[:, half.past :] for layer, array in case.weights[half.number].items()} if case.weights else {}
        for half in halves
    ]
    return [*alone, *together], outputs * 2, weights * 2


def _halves(number: int, sequence: dict[str, Array], axes: Mapping[str, tuple[str | int, ...]], past: Past) -> Halves:
    """Cut along the axis of new positions."""
    name, at = next((name, axes[name].index(past.new_axis)) for name in sequence if past.new_axis in axes.get(name, ()))
    cut = sequence[name].shape[at] // 2
    first, second = {}, {}
    for each, array in sequence.items():
        shape = axes.get(each, ())
        over = [axis in {past.new_axis, past.key_axis} for axis in shape] + [False] * (array.ndim - len(shape))
        first[each] = array[tuple(slice(cut) if counted else slice(None) for counted in over)]
        if each in axes:
            second[each] = array[tuple(slice(cut, None) if axis == past.new_axis else slice(None) for axis in shape)]
    return Halves(number, sequence, first, second, cut)


def _outputs(case: Case, past: Past, half: Halves, given: Continuation, run: Run) -> dict[str, Array]:
    """Return the right outputs of one second half."""
    if not case.outputs:
        # A merged file has inputs that its branch with a cache does not read.
        return run({**half.whole, **half.second, **given.past})
    axes = {spec.name: spec.shape for spec in past.outputs}
    return {
        name: array[tuple(slice(half.past, None) if axis == past.new_axis else slice(None) for axis in axes[name])]
        for name, array in case.outputs[half.number].items()
        if name in axes
    }
