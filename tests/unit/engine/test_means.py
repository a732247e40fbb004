"""The mean over heads as its own output of a tap: who reads it, and that answers are those of all weights.

A tap is the nodes of a graph that return the attention weights of one site. Models, manifests and sequences are
fixtures of conftest.py; `joined_path` and `joined` have means over heads, `embedder_path` and `manifest` are the same
model as an earlier release converted it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from attnserve_server.domain.clock import MonotonicClock
from attnserve_server.domain.values import (
    Array,
    AttentionAnswer,
    AttentionValue,
    EffectiveSelection,
    HeadReduction,
    LayerReduction,
    Links,
    PreparedSequence,
    SequenceResult,
)
from attnserve_server.engine import warmup
from attnserve_server.engine.collation import ShapeCheck, UnexpectedShape, collate, weights_of
from attnserve_server.engine.cost import Footprint
from attnserve_server.engine.executor import Executor
from attnserve_server.engine.graph import compared_values
from attnserve_server.engine.session import RunHandle, RuntimeSession
from attnserve_server.model.equality import Equality
from attnserve_server.model.manifest import Manifest
from attnserve_server.observability.metrics import Metrics
from onnx import numpy_helper

Make = Callable[..., PreparedSequence]
Change = dict[str, object]
NAN_ID = 48
MEAN, MAX = HeadReduction.MEAN, HeadReduction.MAX
# float32 rounds each of a few operations on numbers of at most 1 by 6e-8.
ROUNDING = 1e-6


def selecting(sequence: PreparedSequence, **changes: object) -> PreparedSequence:
    assert sequence.attention is not None
    return replace(sequence, attention=replace(sequence.attention, **changes))  # type: ignore[arg-type]


def selection_of(sequence: PreparedSequence) -> EffectiveSelection:
    assert sequence.attention is not None
    return sequence.attention


async def answered(path: Path, manifest: Manifest, sequences: list[PreparedSequence]) -> list[SequenceResult]:
    session = RuntimeSession.load(path, provider="CPUExecutionProvider", intra_op_threads=1)
    executor = Executor([session], manifest, Metrics().model(manifest.name, "1"), MonotonicClock(), 1)
    executor.start()
    try:
        results = await executor.run(sequences, RunHandle(), 0)
    finally:
        await executor.aclose()
    assert all(isinstance(result, SequenceResult) for result in results)
    return [result for result in results if isinstance(result, SequenceResult)]


def content_of(result: SequenceResult) -> list[Array | Links]:
    assert result.attention is not None
    return [made.content for made in result.attention.maps]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "output"),
    [
        ({"head_reduction": MEAN}, "attention_mean.site0"),
        ({"head_reduction": MEAN, "heads": ((1, 0),)}, "attention_mean.site0"),
        ({"head_reduction": MEAN, "queries": (0,), "top_k": 2}, "attention_mean.site0"),
        ({"head_reduction": MEAN, "layer_reduction": LayerReduction.ROLLOUT}, "attention_mean.site0"),
        ({"head_reduction": MEAN, "layer_reduction": LayerReduction.MEAN}, "attention_mean.site0"),
        ({"head_reduction": MEAN, "heads": ((1,),)}, "attention.site0"),
        ({"head_reduction": MAX}, "attention.site0"),
        ({}, "attention.site0"),
    ],
    ids=str,
)
def test_mean_of_all_heads_alone_reads_the_mean(joined: Manifest, sequence_of: Make, changes, output: str) -> None:
    sequence = selecting(sequence_of([1, 2], [0], outputs=()), **changes)
    assert collate([sequence], joined).fetches == (output,)


def test_scores_and_bundles_without_means_read_all_heads(
    joined: Manifest, manifest: Manifest, sequence_of: Make
) -> None:
    mean = selecting(sequence_of([1, 2], [0], outputs=()), head_reduction=MEAN)
    assert collate([mean], manifest).fetches == ("attention.site0",)
    scored = joined.sites[0].model_copy(update={"scores_output": "attention_scores.site0"})
    with_scores = joined.model_copy(update={"sites": (scored, joined.sites[1])})
    assert collate([selecting(mean, values=AttentionValue.SCORES)], with_scores).fetches == ("attention_scores.site0",)


def test_batch_fetches_all_heads_only_for_sites_where_a_sequence_reads_them(
    joined: Manifest, sequence_of: Make
) -> None:
    mean = selecting(sequence_of([1, 2], [0, 1], outputs=()), head_reduction=MEAN)
    batch = collate([mean, sequence_of([3], [1], outputs=()), mean], joined)
    assert batch.fetches == ("attention_mean.site0", "attention_mean.site1", "attention.site1")
    np.testing.assert_array_equal(batch.feeds["attention_items.site1"], [0, 1, 2])
    assert batch.rows == {0: (0, 2), 1: (0, 1, 2)}


async def test_answers_are_those_of_all_weights(
    joined_path: Path, joined: Manifest, embedder_path: Path, manifest: Manifest, sequence_of: Make, weights_by_hand
) -> None:
    changes: list[Change] = [
        {},
        {"queries": (2, 0)},
        {"layer_reduction": LayerReduction.MEAN},
        {"layer_reduction": LayerReduction.ROLLOUT},
        {"top_k": 2},
    ]
    texts = ([1, 2, 3], [4, 5, 6, 7, 8, 9], [2, 2, 9, 1], [5, 6, 7], [8, 1, 3, 4, 7])
    sequences = [
        selecting(sequence_of(ids, [0, 1]), head_reduction=MEAN, **each)
        for ids, each in zip(texts, changes, strict=True)
    ]
    from_means = await answered(joined_path, joined, sequences)
    from_weights = await answered(embedder_path, manifest, sequences)
    for one, other in zip(from_means, from_weights, strict=True):
        for mine, whole in zip(content_of(one), content_of(other), strict=True):
            if isinstance(mine, Links) and isinstance(whole, Links):
                np.testing.assert_array_equal(mine.keys, whole.keys)
                mine, whole = mine.weights, whole.weights  # noqa: PLW2901 - compared below, as maps are
            assert isinstance(mine, np.ndarray)
            np.testing.assert_allclose(mine, whole, rtol=0, atol=ROUNDING)
    for layer, mean in enumerate(content_of(from_means[0])):
        expected = weights_by_hand(texts[0], layer).mean(axis=0, keepdims=True)
        np.testing.assert_allclose(mean, expected, rtol=0, atol=ROUNDING)


async def test_bits_do_not_depend_on_what_neighbours_select(
    joined_path: Path, joined: Manifest, sequence_of: Make
) -> None:
    own = selecting(sequence_of([1, 2, 3, 4], [0]), head_reduction=MEAN)
    neighbours = [
        [],
        [sequence_of([5, 6, 7, 8])],
        [sequence_of([5, 6, 7, 8], [0])],
        [selecting(sequence_of([5, 6, 7, 8], [0]), head_reduction=MEAN)],
        [sequence_of([5, 6, 7, 8], [0]), selecting(sequence_of([8, 6, 7, 8], [0, 1]), head_reduction=MAX)],
    ]
    answers = [content_of((await answered(joined_path, joined, [own, *others]))[0])[0] for others in neighbours]
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer, answers[0])


def test_weights_of_a_mean_have_one_head_and_all_heads_where_values_are_kept(
    joined: Manifest, sequence_of: Make
) -> None:
    mean = replace(selecting(sequence_of([1, 2], [0], outputs=()), head_reduction=MEAN), keep_values=True)
    batch = collate([sequence_of([3, 4, 5], [0], outputs=()), mean], joined)
    assert batch.fetches == ("attention.site0", "attention_mean.site0")
    weights = np.arange(36, dtype=np.float32).reshape(2, 2, 3, 3)
    fetched = {"attention.site0": weights, "attention_mean.site0": weights.mean(axis=1)}
    own = weights_of(batch, fetched, 1, mean, joined)[0]
    np.testing.assert_array_equal(own, weights[1, :, :2, :2].mean(axis=0, keepdims=True))
    np.testing.assert_array_equal(weights_of(batch, fetched, 1, mean, joined, whole=True)[0], weights[1, :, :2, :2])
    values = compared_values(batch, fetched, 1, mean, joined)
    assert {name: array.shape for name, array in values.items()} == {
        "attention.site0": (2, 2, 2),
        "attention_mean.site0": (1, 2, 2),
    }


def test_mean_may_differ_as_far_as_the_weights_of_its_site() -> None:
    noisy = Equality("fp32", {"attention.site0": 0.25})
    values = np.array([0.5])
    assert noisy.error("attention_mean.site0", values + 0.5, values) == 2
    assert Equality("fp32").error("attention_mean.site0", values + 2e-5, values) == pytest.approx(2, rel=1e-6)


async def test_shadow_check_finds_what_a_mean_hides(joined_path: Path, joined: Manifest, sequence_of: Make) -> None:
    """The repeat compares the weights of all heads. Two heads that differ by opposite amounts have the same mean."""
    sequence = selecting(sequence_of([1, 2, 3], [0]), head_reduction=MEAN)
    session = RuntimeSession.load(joined_path, provider="CPUExecutionProvider", intra_op_threads=1)
    executor = Executor([session], joined, Metrics().model(joined.name, "1"), MonotonicClock(), 1)
    executor.start()
    try:
        kept, _ = await executor.run([replace(sequence, keep_values=True), sequence], RunHandle(), 0)
        assert isinstance(kept, SequenceResult)
        assert kept.values is not None
        values = dict(kept.values)
        assert values.keys() == {"embedding", "attention.site0", "attention_mean.site0"}
        same = await executor.repeat(sequence, values, RunHandle(), 0)
        values["attention.site0"] = values["attention.site0"] + np.float32([[[1e-3]], [[-1e-3]]])
        hidden = await executor.repeat(sequence, values, RunHandle(), 0)
        wrong = {**kept.values, "attention_mean.site0": kept.values["attention_mean.site0"] + np.float32(1e-3)}
        of_mean = await executor.repeat(sequence, wrong, RunHandle(), 0)
    finally:
        await executor.aclose()
    assert (same.error < 1) is True  # type: ignore[union-attr]
    # A difference of 1e-3 with a tolerance of 1e-5.
    assert (hidden.name, hidden.error) == ("attention.site0", pytest.approx(100, rel=1e-2))  # type: ignore[union-attr]
    assert (of_mean.name, of_mean.error) == ("attention_mean.site0", pytest.approx(100, rel=1e-2))  # type: ignore[union-attr]


def test_shape_of_a_mean_is_checked(joined: Manifest, sequence_of: Make) -> None:
    batch = collate([selecting(sequence_of([1, 2], [0], outputs=()), head_reduction=MEAN)], joined)
    ShapeCheck(joined).check(batch, {"attention_mean.site0": np.zeros((1, 2, 2), np.float32)})
    with pytest.raises(UnexpectedShape, match=r"'attention_mean\.site0' has the shape \(1, 2, 2, 2\)"):
        ShapeCheck(joined).check(batch, {"attention_mean.site0": np.zeros((1, 2, 2, 2), np.float32)})


async def test_mean_that_is_not_a_number_fails_its_sequence_alone(
    tmp_path: Path, joined_path: Path, joined: Manifest, sequence_of: Make
) -> None:
    model = onnx.load(joined_path)
    (table,) = [tensor for tensor in model.graph.initializer if tensor.name == "table"]
    broken = numpy_helper.to_array(table).copy()
    broken[NAN_ID] = np.nan
    table.CopyFrom(numpy_helper.from_array(broken, "table"))
    onnx.save(model, tmp_path / "broken.onnx")
    session = RuntimeSession.load(tmp_path / "broken.onnx", provider="CPUExecutionProvider", intra_op_threads=1)
    executor = Executor([session], joined, Metrics().model(joined.name, "1"), MonotonicClock(), 1)
    executor.start()
    try:
        both = [selecting(sequence_of(ids, [0], outputs=()), head_reduction=MEAN) for ids in ([1, 2], [1, NAN_ID])]
        right, wrong = await executor.run(both, RunHandle(), 0)
    finally:
        await executor.aclose()
    assert isinstance(right, SequenceResult)
    assert isinstance(right.attention, AttentionAnswer)
    assert type(wrong).__name__ == "InternalFault"


def test_warm_up_fetches_every_output_of_every_tap(joined_path: Path, joined: Manifest) -> None:
    fetched: set[str] = set()

    class Recorder(RuntimeSession):
        def run(self, feeds, fetches, handle=None, *, exact_shape=False):
            fetched.update(fetches)
            return super().run(feeds, fetches, handle, exact_shape=exact_shape)

    warmup.touch(Recorder.load(joined_path, provider="CPUExecutionProvider"), joined)
    assert fetched >= {name for site in joined.sites for name in site.outputs}


def test_footprint_counts_the_weights_of_all_heads_and_their_mean(
    joined: Manifest, manifest: Manifest, sequence_of: Make
) -> None:
    sequence = selecting(sequence_of([1], [0]), head_reduction=MEAN)
    whole, with_mean = Footprint(manifest).of(sequence), Footprint(joined).of(sequence)
    assert with_mean == {**whole, (0, 0): whole[0, 0] + 4}
