"""Every reduction, and their compositions in the contract's order, against a reference of plain loops in float64.

The reference is written from the definitions in `attention.proto` and shares no line with the code under test: it goes
weight by weight, selects query rows where the contract requires it (late), and never uses float32.

A reduction joins heads, layers or words, or keeps the strongest links. The cases are drawn by hypothesis; nothing is
run by onnxruntime.
"""

from __future__ import annotations

import numpy as np
import pytest
from attnserve_server.attention import answer, check_units, predicted_bytes, resolve
from attnserve_server.domain.errors import InvalidRequest
from attnserve_server.domain.values import (
    AttentionAnswer,
    AttentionMap,
    AttentionSelection,
    AttentionUnit,
    AxisUnits,
    EffectiveSelection,
    HeadReduction,
    LayerReduction,
    Links,
    SpecialTokens,
    WeightDtype,
)
from attnserve_server.model.manifest import SiteSpec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Sums of at most 24 weights of at most 1 in float32 (unit roundoff 6e-8), through at most 4 layers.
TOLERANCE = 1e-6


def site(layer: int, heads: int, kind: str = "self", query_axis: str = "seq", key_axis: str = "seq") -> SiteSpec:
    return SiteSpec(
        name=f"site.{layer}",
        layer=layer,
        kind=kind,
        form="dense",
        operator="Attention",
        heads=heads,
        kv_heads=heads,
        head_dim=4,
        query_axis=query_axis,
        key_axis=key_axis,
        items_input=f"attention_items.{layer}",
        weights_output=f"attention.{layer}",
    )


# --- The reference -------------------------------------------------------------------------------------------------


def groups_of(units: AxisUnits, unit: AttentionUnit) -> list[list[int]]:
    """Positions of each unit."""
    if unit is AttentionUnit.TOKEN:
        return [[position] for position in range(units.length)]
    groups: list[list[int]] = []
    last = -1
    for position, word in enumerate(units.word_ids):
        if word >= 0 and word == last:
            groups[-1].append(position)
        else:
            groups.append([position])
        last = word
    return groups


def joined_heads(maps: np.ndarray, heads: list[int], how: HeadReduction) -> np.ndarray:
    _, length, keys = maps.shape
    if how is HeadReduction.EACH:
        return np.array([[[maps[h][q][k] for k in range(keys)] for q in range(length)] for h in heads], dtype=float)
    out = np.zeros((1, length, keys))
    for q in range(length):
        for k in range(keys):
            column = [float(maps[h][q][k]) for h in heads]
            out[0][q][k] = sum(column) / len(column) if how is HeadReduction.MEAN else max(column)
    return out


def rolled_out(maps: list[np.ndarray]) -> np.ndarray:
    length = maps[0].shape[1]
    product = np.eye(length)
    for each in maps:
        layer = np.zeros((length, length))
        for q in range(length):
            total = sum(each[0][q])
            for k in range(length):
                layer[q][k] = (each[0][q][k] / total if total else float(q == k)) / 2 + (0.5 if q == k else 0.0)
        out = np.zeros((length, length))
        for q in range(length):
            for k in range(length):
                out[q][k] = sum(layer[q][m] * product[m][k] for m in range(length))
        product = out
    return product[np.newaxis]


def merged_words(weights: np.ndarray, rows: list[list[int]], columns: list[list[int]]) -> np.ndarray:
    out = np.zeros((len(weights), len(rows), len(columns)))
    for h in range(len(weights)):
        for r, queries in enumerate(rows):
            for c, keys in enumerate(columns):
                out[h][r][c] = sum(weights[h][q][k] for q in queries for k in keys) / len(queries)
    return out


def reference(
    weights: dict[int, np.ndarray], effective: EffectiveSelection, sites: list[SiteSpec], units: dict[str, AxisUnits]
) -> list[tuple[list[int], list[int], np.ndarray]]:
    """For each map: its query units, its key units, and (heads, queries, keys) before links and dtype, in float64."""
    per_site = [
        joined_heads(weights[layer].astype(float), list(heads), effective.head_reduction)
        for layer, heads in zip(effective.layers, effective.heads, strict=True)
    ]
    named = [sites[layer] for layer in effective.layers]
    if effective.layer_reduction is LayerReduction.MEAN:
        per_site, named = [sum(per_site) / len(per_site)], named[:1]
    elif effective.layer_reduction is LayerReduction.ROLLOUT:
        per_site, named = [rolled_out(per_site)], named[:1]
    maps = []
    for spec, each in zip(named, per_site, strict=True):
        rows = groups_of(units[spec.query_axis], effective.unit)
        columns = groups_of(units[spec.key_axis], effective.unit)
        merged = merged_words(each, rows, columns)
        query_units, key_units = list(range(len(rows))), list(range(len(columns)))
        if effective.special_tokens is SpecialTokens.DROP:
            key_units = [c for c in key_units if not units[spec.key_axis].special[columns[c][0]]]
            kept = np.zeros((len(merged), len(rows), len(key_units)))
            for h in range(len(merged)):
                for r in range(len(rows)):
                    left = sum(merged[h][r][c] for c in key_units)
                    for position, c in enumerate(key_units):
                        kept[h][r][position] = merged[h][r][c] / left if left else 0.0
            merged = kept
            query_units = [r for r in query_units if not units[spec.query_axis].special[rows[r][0]]]
        if effective.queries:
            query_units = [query if query >= 0 else query + len(rows) for query in effective.queries]
        chosen = [[list(merged[h][r]) for r in query_units] for h in range(len(merged))]
        shape = (len(merged), len(query_units), len(key_units))
        maps.append((query_units, key_units, np.array(chosen, dtype=float).reshape(shape)))
    return maps


# --- Comparing -----------------------------------------------------------------------------------------------------


def read(written: np.ndarray, dtype: WeightDtype) -> np.ndarray:
    assert written.dtype == np.dtype(dtype.value)
    assert written.flags.c_contiguous
    return written.astype(float) / (255 if dtype is WeightDtype.UINT8 else 1)


def tensors(result: AttentionAnswer) -> list[np.ndarray]:
    found = []
    for each in result.maps:
        links = each.content
        if isinstance(links, Links):
            found += [links.row_offsets, links.keys, links.weights, links.residual]
        else:
            found.append(links)
    return found


def half_step(dtype: WeightDtype, values: np.ndarray) -> float:
    """What rounding to the written dtype may add: half its step at the greatest value."""
    if dtype is WeightDtype.FLOAT16:
        return float(np.spacing(np.float16(values.max(initial=0)))) / 2
    return 1 / 510 if dtype is WeightDtype.UINT8 else 0.0


def assert_dense(content: np.ndarray, wanted: np.ndarray, dtype: WeightDtype) -> None:
    assert content.shape == wanted.shape
    # Sums of maxima in a word may exceed 1; uint8 saturates at 1.
    shown = np.minimum(wanted, 1) if dtype is WeightDtype.UINT8 else wanted
    assert np.abs(read(content, dtype) - shown).max(initial=0) <= TOLERANCE + half_step(dtype, wanted)


def assert_links(links: Links, key_units: list[int], wanted: np.ndarray, effective: EffectiveSelection) -> None:
    heads, queries, keys = wanted.shape
    assert links.row_offsets.dtype == np.int64
    assert links.keys.dtype == np.int32
    assert links.residual.dtype == np.float32
    assert links.row_offsets.shape == (heads * queries + 1,)
    assert links.row_offsets[0] == 0
    assert links.row_offsets[-1] == len(links.keys) == len(links.weights)
    assert links.residual.shape == (heads, queries)
    assert (links.residual >= 0).all()
    column = {unit: position for position, unit in enumerate(key_units)}
    values = read(links.weights, effective.dtype)
    writing = half_step(effective.dtype, wanted)
    for row in range(heads * queries):
        weights = wanted[row // queries][row % queries]
        span = slice(int(links.row_offsets[row]), int(links.row_offsets[row + 1]))
        chosen = [column[int(key)] for key in links.keys[span]]
        assert len(set(chosen)) == len(chosen)
        limit = min(effective.top_k or keys, keys)
        # A weight within rounding of the bound may fall on either side of it.
        surely = sum(weight >= effective.min_weight + TOLERANCE for weight in weights)
        perhaps = sum(weight >= effective.min_weight - TOLERANCE for weight in weights)
        assert min(limit, surely) <= len(chosen) <= min(limit, perhaps)
        # The greatest first: position by position equal to the sorted row, to within rounding.
        best = sorted(weights, reverse=True)[: len(chosen)]
        got = [weights[position] for position in chosen]
        assert np.abs(np.array(got) - best).max(initial=0) <= 2 * TOLERANCE
        shown = np.minimum(got, 1) if effective.dtype is WeightDtype.UINT8 else np.array(got)
        assert np.abs(values[span] - shown).max(initial=0) <= TOLERANCE + writing
        left_out = sum(weights) - sum(got)
        residual = links.residual[row // queries][row % queries]
        assert abs(residual - left_out) <= 2 * TOLERANCE
        if len(chosen) == keys:
            assert residual == 0


def assert_equals_reference(
    weights: dict[int, np.ndarray],
    selection: AttentionSelection,
    sites: list[SiteSpec],
    units: dict[str, AxisUnits],
) -> AttentionAnswer:
    effective = resolve(selection, sites, "model")
    check_units(effective, sites, units, "model", 0)
    before = {layer: each.copy() for layer, each in weights.items()}
    predicted = predicted_bytes(effective, sites, units)
    result = answer(weights, effective, sites, units)
    for layer, each in before.items():
        np.testing.assert_array_equal(weights[layer], each)
    wanted = reference(weights, effective, sites, units)
    assert len(result.maps) == len(wanted)
    for each, (query_units, key_units, numbers) in zip(result.maps, wanted, strict=True):
        assert_indices(each, query_units, key_units, result)
        if isinstance(each.content, Links):
            assert effective.sparse
            assert_links(each.content, key_units, numbers, effective)
        else:
            assert not effective.sparse
            assert_dense(each.content, numbers, effective.dtype)
    size = sum(tensor.nbytes for tensor in tensors(result))
    assert size <= predicted
    if effective.min_weight == 0:
        assert size == predicted
    for tensor in tensors(result):
        assert tensor.flags.c_contiguous
        assert not any(np.shares_memory(tensor, each) for each in weights.values())
    return result


def assert_indices(each: AttentionMap, query_units: list[int], key_units: list[int], result: AttentionAnswer) -> None:
    lengths = {axis.axis: axis.length for axis in result.axes}
    every_query, every_key = list(range(lengths[each.query_axis])), list(range(lengths[each.key_axis]))
    assert list(each.query_indices) == ([] if query_units == every_query else query_units)
    assert list(each.key_indices) == ([] if key_units == every_key else key_units)


# --- Cases ---------------------------------------------------------------------------------------------------------


def draw_units(draw: st.DrawFn, axis: str) -> AxisUnits:
    """Words of one to three pieces, special tokens and positions without a word, in any order; 1 to 8 of them."""
    word_ids: list[int] = []
    special: list[bool] = []
    words = 0
    for kind in draw(st.lists(st.sampled_from(["special", "bare", 1, 2, 3]), min_size=1, max_size=8)):
        if isinstance(kind, int):
            word_ids += [words] * kind
            special += [False] * kind
            words += 1
        else:
            word_ids.append(-1)
            special.append(kind == "special")
    return AxisUnits(axis=axis, length=len(word_ids), special=tuple(special), word_ids=tuple(word_ids))


def draw_weights(draw: st.DrawFn, heads: int, queries: int, keys: int) -> np.ndarray:
    """Rows of sum 1 with many ties and zeros, some fully masked, as a view into a padded batch."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    padded = np.full((heads, queries + 2, keys + 3), np.nan, dtype=np.float32)
    steps = random.integers(0, draw(st.sampled_from([2, 4, 1000])) + 1, size=(heads, queries, keys)).astype(float)
    steps[random.random((heads, queries)) < draw(st.sampled_from([0.0, 0.3]))] = 0
    totals = steps.sum(axis=2, keepdims=True)
    padded[:, :queries, :keys] = np.divide(steps, totals, out=np.zeros_like(steps), where=totals > 0)
    return padded[:, :queries, :keys]


@st.composite
def cases(draw: st.DrawFn, *, cross: bool, layers: LayerReduction | None = None):
    query_axis, key_axis = ("target", "source") if cross else ("seq", "seq")
    units = {axis: draw_units(draw, axis) for axis in dict.fromkeys((query_axis, key_axis))}
    layer_count, heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kind = "cross" if cross else draw(st.sampled_from(["self", "causal"]))
    sites = [site(layer, heads, kind, query_axis, key_axis) for layer in range(layer_count)]
    shape = (heads, units[query_axis].length, units[key_axis].length)
    weights = {layer: draw_weights(draw, *shape) for layer in range(layer_count)}
    unit = draw(st.sampled_from(AttentionUnit))
    rows = len(groups_of(units[query_axis], unit))
    layer_reduction = layers or draw(st.sampled_from([LayerReduction.EACH, LayerReduction.MEAN]))
    head_reductions = [None, HeadReduction.MEAN, HeadReduction.MAX]
    if layer_reduction is not LayerReduction.ROLLOUT:
        head_reductions.append(HeadReduction.EACH)
    signed = st.sampled_from([0, 1])
    selection = AttentionSelection(
        layers=tuple(draw(st.lists(st.integers(-layer_count, layer_count - 1), max_size=4))),
        heads=tuple(
            head - heads * draw(signed)
            for head in draw(st.lists(st.integers(0, heads - 1), unique=True, max_size=heads))
        ),
        head_reduction=draw(st.sampled_from(head_reductions)),
        layer_reduction=layer_reduction,
        queries=tuple(
            row - rows * draw(signed) for row in draw(st.lists(st.integers(0, rows - 1), unique=True, max_size=rows))
        ),
        unit=unit,
        special_tokens=draw(st.sampled_from(SpecialTokens)),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 5, 100])),
        min_weight=draw(st.sampled_from([0.0, 0.0, 0.05, 0.3, 1.0])),
        dtype=draw(st.sampled_from(WeightDtype)),
    )
    return weights, selection, sites, units


# Only the reference of plain loops is slow; the code under test is not.
thorough = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@given(case=cases(cross=False))
@thorough
def test_any_selection_of_self_attention_equals_the_loops(case):
    assert_equals_reference(*case)


@given(case=cases(cross=True))
@thorough
def test_any_selection_of_cross_attention_equals_the_loops(case):
    assert_equals_reference(*case)


@given(case=cases(cross=False, layers=LayerReduction.ROLLOUT))
@thorough
def test_any_rollout_equals_the_loops(case):
    assert_equals_reference(*case)


@given(case=cases(cross=False, layers=LayerReduction.ROLLOUT))
@thorough
def test_rows_of_a_rollout_sum_to_1_even_where_rows_were_masked(case):
    weights, selection, sites, units = case
    plain = AttentionSelection(layers=selection.layers, layer_reduction=LayerReduction.ROLLOUT)
    result = assert_equals_reference(weights, plain, sites, units)
    np.testing.assert_allclose(result.maps[0].content.sum(axis=2), 1, atol=TOLERANCE)


@given(case=cases(cross=False))
@thorough
def test_naming_every_row_gives_the_same_numbers_as_naming_none(case):
    weights, selection, sites, units = case
    rows = len(groups_of(units["seq"], selection.unit))
    keep = {"unit": selection.unit, "head_reduction": selection.head_reduction, "heads": selection.heads}
    whole = answer(weights, resolve(AttentionSelection(**keep), sites, "m"), sites, units)
    backwards = resolve(AttentionSelection(**keep, queries=tuple(range(rows - 1, -1, -1))), sites, "m")
    for one, other in zip(whole.maps, answer(weights, backwards, sites, units).maps, strict=True):
        np.testing.assert_array_equal(one.content[:, ::-1], other.content)


def test_one_row_of_a_long_rollout_equals_the_row_of_the_whole():
    random = np.random.default_rng(7)
    length = 64
    sites = [site(layer, 2) for layer in range(6)]
    weights = {layer: random.dirichlet(np.ones(length), (2, length)).astype(np.float32) for layer in range(6)}
    units = {"seq": AxisUnits(axis="seq", length=length)}
    whole = answer(
        weights, resolve(AttentionSelection(layer_reduction=LayerReduction.ROLLOUT), sites, "m"), sites, units
    )
    rows = resolve(AttentionSelection(layer_reduction=LayerReduction.ROLLOUT, queries=(5, -1)), sites, "m")
    some = answer(weights, rows, sites, units)
    # The same products, which a matrix library may add up in another order for another number of rows.
    np.testing.assert_allclose(some.maps[0].content, whole.maps[0].content[:, [5, 63]], atol=TOLERANCE)


def test_long_words_and_many_layers_stay_within_tolerance():
    """The largest sums there are: a word of all 512 positions, and the mean over 48 layers."""
    random = np.random.default_rng(11)
    length = 512
    sites = [site(layer, 1) for layer in range(48)]
    raw = random.dirichlet(np.full(length, 0.1), (48, 1, length)).astype(np.float32)
    units = {"seq": AxisUnits(axis="seq", length=length, special=(False,) * length, word_ids=(0,) * length)}
    selection = AttentionSelection(layer_reduction=LayerReduction.MEAN, unit=AttentionUnit.WORD)
    result = answer(dict(enumerate(raw)), resolve(selection, sites, "m"), sites, units)
    wanted = raw.astype(float).mean(axis=0).sum(axis=2).mean(axis=1)
    np.testing.assert_allclose(result.maps[0].content[0, 0], wanted, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", list(WeightDtype))
def test_ties_are_kept_in_order_of_their_keys(dtype):
    weights = {0: np.array([[[0.2, 0.3, 0.2, 0.0, 0.3, -0.0]]], dtype=np.float32)}
    units = {"target": AxisUnits("target", 1), "source": AxisUnits("source", 6)}
    sites = [site(0, 1, "cross", "target", "source")]
    for top_k, keys in [(1, [1]), (2, [1, 4]), (3, [1, 4, 0]), (5, [1, 4, 0, 2, 3]), (6, [1, 4, 0, 2, 3, 5])]:
        selection = AttentionSelection(top_k=top_k, dtype=dtype)
        result = assert_equals_reference(weights, selection, sites, units)
        assert result.maps[0].content.keys.tolist() == keys


@pytest.mark.parametrize("head_reduction", list(HeadReduction))
@pytest.mark.parametrize("top_k", [0, 3])
def test_a_sequence_of_special_tokens_alone_leaves_empty_maps_when_they_are_dropped(head_reduction, top_k):
    weights = {0: np.full((2, 3, 3), 1 / 3, dtype=np.float32)}
    units = {"seq": AxisUnits("seq", 3, special=(True,) * 3, word_ids=(-1,) * 3)}
    for queries in [(), (0, 2)]:
        selection = AttentionSelection(
            head_reduction=head_reduction,
            special_tokens=SpecialTokens.DROP,
            top_k=top_k,
            queries=queries,
            unit=AttentionUnit.WORD,
        )
        assert_equals_reference(weights, selection, [site(0, 2)], units)


@pytest.mark.parametrize("layer_reduction", list(LayerReduction))
@pytest.mark.parametrize("unit", list(AttentionUnit))
def test_a_sequence_of_length_1(layer_reduction, unit):
    weights = {layer: np.ones((2, 1, 1), dtype=np.float32) for layer in range(2)}
    units = {"seq": AxisUnits("seq", 1, special=(False,), word_ids=(0,))}
    selection = AttentionSelection(layer_reduction=layer_reduction, unit=unit, special_tokens=SpecialTokens.DROP)
    result = assert_equals_reference(weights, selection, [site(0, 2), site(1, 2)], units)
    assert all((each.content == 1).all() for each in result.maps)


def test_fully_masked_rows_stay_zero_and_never_turn_into_nan():
    weights = {0: np.zeros((2, 3, 3), dtype=np.float32)}
    units = {"seq": AxisUnits("seq", 3, special=(True, False, False), word_ids=(-1, 0, 0))}
    for unit in AttentionUnit:
        for head_reduction in HeadReduction:
            selection = AttentionSelection(
                head_reduction=head_reduction, unit=unit, special_tokens=SpecialTokens.DROP, queries=(0, 1)
            )
            result = assert_equals_reference(weights, selection, [site(0, 2)], units)
            assert (result.maps[0].content == 0).all()


def test_the_reference_distinguishes_the_order_of_steps():
    """Positive control: dropping special tokens before the heads are joined gives other numbers."""
    weights = {0: np.array([[[0.8, 0.1, 0.1]] * 3, [[0.2, 0.6, 0.2]] * 3], dtype=np.float32)}
    units = {"seq": AxisUnits("seq", 3, special=(True, False, False), word_ids=(-1, 0, 1))}
    selection = AttentionSelection(head_reduction=HeadReduction.MEAN, special_tokens=SpecialTokens.DROP)
    effective = resolve(selection, [site(0, 2)], "m")
    [(_, _, wanted)] = reference(weights, effective, [site(0, 2)], units)
    dropped_first = weights[0][:, 1:, 1:] / weights[0][:, 1:, 1:].sum(axis=2, keepdims=True)
    with pytest.raises(AssertionError):
        assert_dense(dropped_first.mean(axis=0, keepdims=True), wanted, WeightDtype.FLOAT32)


def test_two_names_for_one_row_are_refused_by_sequence():
    units = {"seq": AxisUnits("seq", 3)}
    effective = resolve(AttentionSelection(queries=(2, -1)), [site(0, 1)], "m")
    with pytest.raises(InvalidRequest, match=r"attention\.queries\[1\]: query -1 is the same row of sequence 4"):
        check_units(effective, [site(0, 1)], units, "m", 4)
