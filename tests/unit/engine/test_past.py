"""Sequences with a past: they run on the continuing graph, with weights over past and new keys.

A past is the keys and values of earlier positions. The fixture `executor` runs a small decoder, whose answers
`reference` computes in float64. A failing sequence gets InternalFault, and the others their results.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from attnserve_server.attention import continued_units
from attnserve_server.domain.clock import MonotonicClock
from attnserve_server.domain.errors import AttnserveError, InternalFault
from attnserve_server.domain.values import AxisUnits, PreparedSequence, SequenceResult
from attnserve_server.engine.cost import Footprint
from attnserve_server.engine.executor import Executor
from attnserve_server.engine.session import RunHandle, RuntimeSession
from attnserve_server.engine.warmup import selection_of_all, synthetic
from attnserve_server.observability.metrics import Metrics
from past_graphs import KV_HEADS, LAYERS, MAX_LENGTH, PRESENTS, Answer, manifest, reference, write_files

MANIFEST = manifest()
CONTINUING = MANIFEST.continuing
assert CONTINUING is not None
# float32 sums in another order than the float64 reference; logits are below 60.
WEIGHTS, LOGITS = 1e-5, 1e-4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_files(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
async def executor(files: dict[str, Path]) -> AsyncIterator[Executor]:
    prompt, past = (RuntimeSession.load(files[name], provider="CPUExecutionProvider") for name in list(files)[:2])
    made = Executor([prompt], MANIFEST, Metrics().model("decoder", "1"), MonotonicClock(), 2, [past])
    made.start()
    yield made
    await made.aclose()


def sequence(ids: list[int], before: Answer | None = None, outputs: tuple[str, ...] = ("logits",)) -> PreparedSequence:
    """One sequence as validation prepares it; `before`: the answer whose presents are its past."""
    new = len(ids)
    past = 0 if before is None else before.presents[PRESENTS[0]].shape[1]
    tensors = {
        "input_ids": np.array(ids, np.int64),
        "attention_mask": np.ones(past + new, np.int64),
        "position_ids": np.arange(past, past + new, dtype=np.int64),
        **({} if before is None else before.pasts),
    }
    units = {"seq": AxisUnits("seq", new)}
    if past:
        units["past+seq"] = continued_units("past+seq", units["seq"], past)
    lengths = {"seq": new, "past": past} if past else {"seq": new}
    return PreparedSequence(tensors, lengths, outputs, selection_of_all(MANIFEST), units=units, past=past)


def answered(outcome: SequenceResult | AttnserveError) -> SequenceResult:
    assert isinstance(outcome, SequenceResult), outcome
    return outcome


def assert_is(outcome: SequenceResult | AttnserveError, expected: Answer) -> None:
    result = answered(outcome)
    np.testing.assert_allclose(result.outputs["logits"], expected.logits, atol=LOGITS)
    assert result.attention is not None
    for found, weights in zip(result.attention.maps, expected.weights, strict=True):
        np.testing.assert_allclose(found.content, weights, atol=WEIGHTS)


async def test_a_sequence_with_a_past_has_a_column_for_each_past_and_new_key(executor: Executor) -> None:
    before = reference([4, 5, 6])
    outcome, other = await executor.run(
        [sequence([7, 8], before), sequence([9, 4], reference([8, 8, 4]))], RunHandle(), 0
    )
    assert_is(outcome, reference([7, 8], before.pasts))
    assert_is(other, reference([9, 4], reference([8, 8, 4]).pasts))
    result = answered(outcome)
    assert result.attention is not None
    first = result.attention.maps[0]
    assert (first.query_axis, first.key_axis, first.content.shape) == ("seq", "past+seq", (4, 2, 5))
    assert [units.axis for units in result.attention.axes] == ["seq", "past+seq"]
    assert result.run.useful_tokens == result.run.computed_tokens == 10


async def test_a_prompt_equals_its_end_after_a_past_of_its_beginning(executor: Executor) -> None:
    ids = [4, 9, 6, 11, 5]
    (whole,) = await executor.run([sequence(ids, outputs=("logits", *PRESENTS))], RunHandle(), 0)
    assert_is(whole, reference(ids))
    full = answered(whole)
    start = replace(reference(ids), presents={name: full.outputs[name][:, :3] for name in PRESENTS})
    (end,) = await executor.run([sequence(ids[3:], start, outputs=("logits", *PRESENTS))], RunHandle(), 1)
    continued = answered(end)
    np.testing.assert_allclose(continued.outputs["logits"], full.outputs["logits"][3:], atol=LOGITS)
    for name in PRESENTS:
        assert continued.outputs[name].shape == (KV_HEADS, 5, 4)
        np.testing.assert_allclose(continued.outputs[name], full.outputs[name], atol=WEIGHTS)
    assert full.attention is not None
    assert continued.attention is not None
    for layer in range(LAYERS):
        rows = full.attention.maps[layer].content[:, 3:]
        np.testing.assert_allclose(continued.attention.maps[layer].content, rows, atol=WEIGHTS)


async def test_new_positions_of_different_lengths_are_padded_if_the_certificate_proves_it(
    files: dict[str, Path],
) -> None:
    padded = manifest(padded=True)
    sessions = [RuntimeSession.load(files[name], provider="CPUExecutionProvider") for name in list(files)[:2]]
    executor = Executor(sessions[:1], padded, Metrics().model("decoder", "1"), MonotonicClock(), 1, sessions[1:])
    executor.start()
    before = reference([4, 5, 6])
    try:
        outcomes = await executor.run([sequence([7], before), sequence([7, 8, 9], before)], RunHandle(), 0)
    finally:
        await executor.aclose()
    assert_is(outcomes[0], reference([7], before.pasts))
    assert_is(outcomes[1], reference([7, 8, 9], before.pasts))
    assert answered(outcomes[0]).run.computed_tokens == 12


async def test_a_failing_sequence_with_a_past_fails_alone(executor: Executor) -> None:
    before = reference([4, 5, 6])
    broken = sequence([8], before)
    broken = replace(broken, tensors={**broken.tensors, "position_ids": np.array([MAX_LENGTH + 5], np.int64)})
    outcomes = await executor.run([sequence([7], before), broken, sequence([9], before)], RunHandle(), 0)
    assert isinstance(outcomes[1], InternalFault)
    assert_is(outcomes[0], reference([7], before.pasts))
    assert_is(outcomes[2], reference([9], before.pasts))


async def test_the_shadow_check_repeats_a_sequence_with_a_past_alone(executor: Executor) -> None:
    before = reference([4, 5, 6])
    sampled = replace(sequence([7, 8], before), keep_values=True)
    outcome, _ = await executor.run([sampled, sequence([9, 4], before)], RunHandle(), 0)
    values = answered(outcome).values
    assert values is not None
    difference = await executor.repeat(sampled, values, RunHandle(), 1)
    assert not isinstance(difference, AttnserveError)
    assert difference.error < 1
    # Positive control: a changed answer differs.
    wrong = await executor.repeat(sampled, {**values, "logits": values["logits"] + 1}, RunHandle(), 1)
    assert not isinstance(wrong, AttnserveError)
    assert wrong.error > 1


async def test_warm_up_runs_both_graphs_and_times_them_apart(executor: Executor) -> None:
    assert executor.past_cost is None
    timed, _ = await executor.warm_up()
    assert max(run.tokens for run in timed) == MAX_LENGTH
    assert executor.cost is not None
    assert executor.past_cost is not None
    before = executor.cost
    for _ in range(64):  # a fit each 64 runs
        await executor.run([replace(sequence([7], reference([4])), attention=None)], RunHandle(), 0)
    assert executor.cost == before, "runs with a past do not change the cost of prompts"


def test_a_synthetic_sequence_shares_the_greatest_length_with_its_past() -> None:
    made = synthetic(CONTINUING, 512)
    assert (made.past, made.lengths) == (MAX_LENGTH // 2, {"seq": MAX_LENGTH // 2, "past": MAX_LENGTH // 2})
    assert made.tensors["attention_mask"].shape == (MAX_LENGTH,)


def test_the_footprint_counts_the_past_and_the_presents() -> None:
    made = synthetic(CONTINUING, 4)
    terms = Footprint(CONTINUING).of(made)
    # Axes: seq, past. Ids, places and logits of 16 words, and the mask over both.
    cache = 2 * LAYERS * KV_HEADS * 4 * 4  # bytes of one position: keys and values of each layer
    assert terms == {(0,): 8 + 8 + 8 + 14 * 4 + cache, (1,): 8 + cache + cache}
