"""What the axes of a site's weights are, learnt by running, and the reasons where they are not understood.

A layout names the factors of each axis: batch, head, query, key or window. `layout_of` and `only_site` learn it for a
graph with one site. A site that is not understood is `Untappable`, with the reason; a graph that does not run at the
lengths tried raises BuildRefused. A site is a place in a graph that computes attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.assemble import Assembled, assemble
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.sites import Factor, Layout, Probabilities, Untappable
from attnserve_server.conversion.base.steps import Steps as Progress
from attnserve_server.conversion.inputs.signature import Signature, signature_of
from attnserve_server.conversion.learning import sites as room
from attnserve_server.conversion.learning.layout import layouts_of
from attnserve_server.conversion.learning.layout_runs import lengthen, run_all
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.manifest import InputSpec, SiteSpec
from batch_graphs import graph
from onnx_files import encoder
from opened import exposed, runner_of
from step_graphs import WIDTH, Steps, attention


def assembled(model: onnx.ModelProto, folder: Path) -> Assembled:
    return assemble(model, Sampler(signature_of(model.graph), 0), folder, Progress.silent())


def only_site(steps: Steps, output: str, folder: Path, *, batch: str | int = "batch") -> SiteSpec:
    """The site of a graph whose one output has the batch first."""
    (site,) = assembled(steps.model(output, batch=batch), folder).sites
    return site


def split(steps: Steps, value: str, heads: int = 2) -> str:
    """(B, H, T, D)."""
    apart = steps.op("Reshape", value, steps.const(kind=np.int64, value=[0, 0, heads, -1]))
    return steps.op("Transpose", apart, perm=[0, 2, 1, 3])


def merged(steps: Steps, value: str) -> str:
    return steps.op("Transpose", value, perm=[0, 2, 1, 3])


def heads_apart(steps: Steps) -> str:
    query, key = split(steps, "x"), split(steps, "y")
    scores = steps.op("MatMul", query, steps.op("Transpose", key, perm=[0, 1, 3, 2]))
    return merged(steps, attention(steps, scores=scores, value=key))


def layout_of(nodes: str, folder: Path, **constants: Any) -> Layout | Untappable:
    """The layout of the one site of a graph over x (B, T, 8)."""
    runner, sites = exposed(graph(f"g (float[b, t, 8] x) => (float z) {{ {nodes} }}", **constants), folder)
    (site,) = sites.values()
    assert isinstance(site.attention, Probabilities)
    sampler = Sampler(Signature((InputSpec(name="x", dtype="float32", shape=("t", 8)),), ("t",)))
    lengths = {"t": 5}, {"t": 7}
    (layout,) = layouts_of(runner, sampler, {"site": site.attention}, lengths).values()
    return layout


FOUR_HEADS = """
    shape = Shape(x)
    q4 = Reshape(x, apart)
    qh = Transpose<perm=[PERM]>(q4)
    length = Gather(shape, middle)
    folded = Concat<axis=0>(all, length, two)
    q = Reshape(qh, folded)
    kt = Transpose<perm=[0, 2, 1]>(q)
    s = MatMul(q, kt)
    p = Softmax<axis=-1>(s)
    z = MatMul(p, q)
"""


@pytest.mark.parametrize(
    ("perm", "fold"),
    [("0, 2, 1, 3", (Factor("batch"), Factor("head", 4))), ("2, 0, 1, 3", (Factor("head", 4), Factor("batch")))],
    ids=["batch slower", "head slower"],
)
def test_the_order_of_a_fold_is_that_in_which_rows_move(perm: str, fold: tuple[Factor, ...], tmp_path: Path) -> None:
    constants = {
        "apart": np.array([0, 0, 4, 2]), "all": np.array([-1]), "middle": np.array([1]), "two": np.array([2])
    }  # fmt: skip
    found = layout_of(FOUR_HEADS.replace("PERM", perm), tmp_path, **constants)
    assert found == Layout((fold, (Factor("query"),), (Factor("key"),)), kv_heads=4, head_dim=2)


def test_a_number_of_windows_that_grows_with_the_length_is_no_number_of_heads(tmp_path: Path) -> None:
    # One window for each position: it attends to itself and to a constant.
    nodes = """
        q = Unsqueeze(x, depth)
        twice = Concat<axis=2>(q, q)
        kt = Transpose<perm=[0, 1, 3, 2]>(twice)
        s = MatMul(q, kt)
        p = Softmax<axis=-1>(s)
        z = MatMul(p, twice)
    """
    found = layout_of(nodes, tmp_path, depth=np.array([2]))
    axes = ((Factor("batch"),), (Factor("window"),), (Factor("query"),), (Factor("key"),))
    assert found == Layout(axes, kv_heads=1, head_dim=8)


def test_heads_that_repeat_a_value_are_counted_once(tmp_path: Path) -> None:
    nodes = """
        q4 = Reshape(x, apart)
        q = Transpose<perm=[0, 2, 1, 3]>(q4)
        first = Slice(q, zero, two, one)
        k = Gather<axis=1>(first, pairs)
        kt = Transpose<perm=[0, 1, 3, 2]>(k)
        s = MatMul(q, kt)
        p = Softmax<axis=-1>(s)
        z = MatMul(p, k)
    """
    constants = {"apart": np.array([0, 0, 4, 2]), "pairs": np.array([0, 0, 1, 1])}
    found = layout_of(nodes, tmp_path, **constants, zero=np.array([0]), two=np.array([2]), one=np.array([1]))
    assert isinstance(found, Layout)
    assert (found.heads, found.kv_heads) == (4, 2)


def test_runs_have_two_batches_two_lengths_and_one_other_order(tmp_path: Path) -> None:
    sampler = Sampler(Signature((InputSpec(name="x", dtype="float32", shape=("t", 8)),), ("t",)))
    runner = runner_of(graph("g (float[b, t, 8] x) => (float z) { z = Neg(x) }"), tmp_path)
    runs = run_all(runner, sampler, ({"t": 5}, {"t": 7}), ["z", "x"])
    assert [runs["z"].fewer.shape, runs["z"].longer.shape] == [(2, 5, 8), (3, 7, 8)]
    assert runs["z"].reordered is not None
    np.testing.assert_array_equal(runs["z"].reordered, runs["z"].base[[1, 2, 0]])
    np.testing.assert_array_equal(-runs["x"].base, runs["z"].base)
    lengthen(runner, sampler, runs, {"z": 4})
    assert (runs["z"].longer.shape, runs["z"].lengths) == ((3, 12, 8), ({"t": 5}, {"t": 12}))
    assert runs["x"].longer.shape == (3, 7, 8)


def test_one_head_needs_no_axis(tmp_path: Path) -> None:
    steps = Steps()
    site = only_site(steps, attention(steps), tmp_path)
    assert (site.heads, site.kv_heads, site.head_dim) == (1, 1, WIDTH)
    assert (site.query_axis, site.key_axis, site.kind) == ("target", "source", "cross")


@pytest.mark.parametrize("batch", ["batch", 1])
def test_heads_may_have_a_separate_axis(batch: str | int, tmp_path: Path) -> None:
    steps = Steps()
    site = only_site(steps, heads_apart(steps), tmp_path, batch=batch)
    assert site.available
    assert (site.heads, site.head_dim) == (2, WIDTH // 2)


def folded(steps: Steps, value: str) -> str:
    """(B * H, T, D)."""
    length = steps.op("Slice", steps.op("Shape", value), *(steps.const(kind=np.int64, value=[at]) for at in (1, 2)))
    ends = [steps.const(kind=np.int64, value=[number]) for number in (-1, WIDTH // 2)]
    return steps.op("Reshape", split(steps, value), steps.op("Concat", ends[0], length, ends[1], axis=0))


def heads_folded(steps: Steps) -> str:
    scores = steps.op("MatMul", folded(steps, "x"), steps.turned(folded(steps, "y")))
    attended = attention(steps, scores=scores, value=folded(steps, "y"))
    count = steps.op("Slice", steps.op("Shape", "x"), *(steps.const(kind=np.int64, value=[at]) for at in (0, 1)))
    shape = steps.op("Concat", count, steps.const(kind=np.int64, value=[-1, WIDTH]), axis=0)
    return steps.op("Reshape", attended, shape)


@pytest.mark.parametrize("batch", ["batch", 1])
def test_heads_folded_into_the_batch(batch: str | int, tmp_path: Path) -> None:
    steps = Steps()
    site = only_site(steps, heads_folded(steps), tmp_path, batch=batch)
    assert site.available
    assert (site.heads, site.kv_heads) == (2, 2)


def test_heads_folded_into_a_batch_of_one_give_the_weights_of_each_head(tmp_path: Path) -> None:
    weights = []
    for make in (heads_apart, heads_folded):
        steps = Steps()
        done = assembled(steps.model(make(steps), batch=1), tmp_path)
        (site,) = done.sites
        session = RuntimeSession.load(done.model_path, provider="CPUExecutionProvider")
        rng = np.random.default_rng(0)
        feeds = {"x": rng.normal(size=(1, 3, WIDTH)), "y": rng.normal(size=(1, 5, WIDTH))}
        narrow = {name: array.astype(np.float32) for name, array in feeds.items()}
        weights += session.run({**narrow, site.items_input: np.array([0, 0])}, [site.weights_output])
    assert weights[0].shape == (2, 2, 3, 5)
    np.testing.assert_allclose(weights[0], weights[1], rtol=0, atol=1e-6)  # float32 sums


def test_sites_that_share_a_fold_with_the_queries_give_the_reason(tmp_path: Path) -> None:
    # All queries of the batch attend to the keys of each row in turn.
    steps = Steps()
    rows = steps.op("Reshape", "x", steps.const(kind=np.int64, value=[1, -1, WIDTH]))
    keys = steps.op("ReduceMean", "y", axes=[0], keepdims=1)
    attended = attention(steps, scores=steps.op("MatMul", rows, steps.turned(keys)), value=keys)
    site = only_site(steps, steps.op("Reshape", attended, steps.op("Shape", "x")), tmp_path)
    assert site.unavailable_reason == "its queries are folded into the batch"


def test_keys_of_the_whole_batch_give_the_reason(tmp_path: Path) -> None:
    steps = Steps()
    rows = steps.op("Reshape", "y", steps.const(kind=np.int64, value=[1, -1, WIDTH]))
    site = only_site(steps, attention(steps, scores=steps.op("MatMul", "x", steps.turned(rows)), value=rows), tmp_path)
    assert site.unavailable_reason == "its keys follow the batch"


def test_weights_without_a_batch_give_the_reason(tmp_path: Path) -> None:
    steps = Steps()
    means = [steps.op("ReduceMean", name, axes=[0], keepdims=1) for name in ("x", "y")]
    attended = attention(steps, scores=steps.op("MatMul", means[0], steps.turned(means[1])), value=means[1])
    site = only_site(steps, steps.op("Add", "x", attended), tmp_path)
    assert site.unavailable_reason == "no axes of its weights follow the batch, where one should"


def test_weights_that_mix_rows_of_the_batch_give_the_reason(tmp_path: Path) -> None:
    # Each row's keys are those of the row before it in the batch: no reordering of rows explains the weights.
    steps = Steps()
    start, end = (steps.const(kind=np.int64, value=[number]) for number in (0, 1))
    rest = steps.op("Slice", "y", end, steps.const(kind=np.int64, value=[99]), start)
    shifted = steps.op(
        "Concat", rest, steps.op("Mul", steps.op("Slice", "y", start, end, start), steps.const(value=0.0)), axis=0
    )
    site = only_site(steps, attention(steps, scores=steps.op("MatMul", "x", steps.turned(shifted))), tmp_path)
    assert site.unavailable_reason == "its weights do not follow the rows of the batch"


def test_heads_that_may_be_folded_into_the_queries_give_the_reason(tmp_path: Path) -> None:
    # Two query heads in a row share the one key head.
    steps = Steps()
    pairs = steps.op("Reshape", "x", steps.const(kind=np.int64, value=[0, -1, WIDTH // 2]))
    keys = steps.op("MatMul", "y", steps.const(WIDTH, WIDTH // 2))
    attended = attention(steps, scores=steps.op("MatMul", pairs, steps.turned(keys)), value=keys)
    site = only_site(steps, steps.op("Reshape", attended, steps.const(kind=np.int64, value=[0, -1, WIDTH])), tmp_path)
    assert site.unavailable_reason == "its queries are 2 times as many as an input's: heads may be folded into them"


def test_graph_that_takes_no_such_lengths_is_refused_with_the_lengths_tried(tmp_path: Path) -> None:
    # Queries and keys are added: their axes must be equal, which the file does not declare.
    steps = Steps()
    both = steps.op("Add", "x", "y")
    model = steps.model(attention(steps, scores=steps.op("MatMul", both, steps.turned("y"))))
    with pytest.raises(
        BuildRefused, match=r"tried on target=5, source=7; axes that must be equal need the same symbol"
    ):
        assembled(model, tmp_path)


@pytest.mark.parametrize("form", ["decomposed", "operator"])
def test_site_whose_weights_do_not_make_its_output_is_listed_with_the_difference(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "operator":
        model = onnx.shape_inference.infer_shapes(encoder())
    else:
        steps = Steps()
        model = steps.model(heads_apart(steps))
    monkeypatch.setattr(room, "product_errors", lambda *arguments: dict.fromkeys(arguments[3], 0.5))
    warnings: list[str] = []
    progress = Progress.silent()
    monkeypatch.setattr(type(progress), "warn", lambda self, words: warnings.append(words))
    done = assemble(model, Sampler(signature_of(model.graph), 50), tmp_path, progress)
    (site,) = done.sites
    assert site.unavailable_reason == "its weights @ value differ from its own output by 0.5, more than 0.0001"
    assert [words for words in warnings if site.unavailable_reason in words]
    session = RuntimeSession.load(done.model_path, provider="CPUExecutionProvider")
    assert not [name for name in session.input_names if name.startswith("attention_items")]
