"""Windows and heads, which look alike where lengths are fixed: distinguished, with weights equal to the definition.

`Folded` makes attention within windows in a named layout, such as `bw h`. Most tests add the nodes that return weights
to a graph, and compare these with its definition. A site that no run distinguishes is unavailable. A site is a place in
a graph that computes attention.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from attnserve_server.attention.bands import band_keys, lay_out
from attnserve_server.conversion.assemble import Assembled, assemble
from attnserve_server.conversion.base.sites import Factor
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.learning.windows import apart as room
from attnserve_server.conversion.learning.windows.apart import Followed, apart
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.manifest import SiteSpec
from folded_windows import LENGTH, Array, Folded, grid_of_pixels, padded_to_windows
from limited_graphs import WIDTH
from step_graphs import Steps as Made

pytestmark = pytest.mark.slow


def assembled(model: onnx.ModelProto, folder: Path) -> Assembled:
    return assemble(model, Sampler(signature_of(model.graph)), folder, Steps.silent())


def weights_of(done: Assembled, site: SiteSpec, x: Array, *items: int) -> Array:
    """(n, H, L, S), those of a band where their keys are."""
    session = RuntimeSession.load(done.model_path, provider="CPUExecutionProvider", intra_op_threads=1)
    others = {name: np.empty(0, np.int64) for name in session.input_names if name.startswith("attention_items")}
    feeds = {"x": x, **others, str(site.items_input): np.array(items)}
    (found,) = session.run(feeds, [str(site.weights_output)])
    if site.band is None:
        return found
    keys = band_keys(site.band, x.shape[1], x.shape[1])
    return np.stack([lay_out(own, keys, x.shape[1]) for own in found])


LAYOUTS = ("bw", "b w", "wb", "bw h", "b w h", "b h w", "bwh", "bhw", "whb", "hwb", "b wh", "b hw", "wh b")


@pytest.mark.parametrize("windows", ["runs", "squares", "strided"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_are_distinguished_from_heads_in_every_layout(layout: str, windows: str, tmp_path: Path) -> None:
    case = Folded(layout, windows, heads=2 if "h" in layout else 1)
    done = assembled(case.model(), tmp_path)
    (site,) = done.sites
    assert (site.form, site.heads, site.available) == ("windowed", case.heads, True), site.unavailable_reason
    assert done.fixed_axes[site.query_axis] == done.fixed_axes[site.key_axis] == LENGTH
    x = np.random.default_rng(2).normal(size=(3, LENGTH, WIDTH)).astype(np.float32)
    # Softmaxes of float32 scores of size 10.
    np.testing.assert_allclose(weights_of(done, site, x, 2, 0), case.reference(x)[[2, 0]], rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", ["bh", "hb", "b h", "h b"])
def test_heads_over_a_fixed_length_stay_heads(layout: str, tmp_path: Path) -> None:
    case = Folded(layout, windows="", heads=4)
    done = assembled(case.model(), tmp_path)
    (site,) = done.sites
    assert (site.form, site.heads, site.band) == ("dense", 4, None)
    x = np.random.default_rng(2).normal(size=(3, LENGTH, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(weights_of(done, site, x, 1), case.reference(x)[[1]], rtol=0, atol=2e-5)


@pytest.mark.parametrize("projected", [True, False])
def test_windows_behind_a_layer_that_mixes_all_positions(projected: bool, tmp_path: Path) -> None:
    case = Folded(projected=projected, behind=True)
    done = assembled(case.model(), tmp_path)
    dense, windowed = done.sites
    assert (dense.form, windowed.form, windowed.heads) == ("dense", "windowed", 1)
    x = np.random.default_rng(2).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(weights_of(done, windowed, x, 0, 1), case.reference(x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("length", [3, 4, 5, 13])
def test_windows_of_any_number_folded_into_the_batch(length: int, tmp_path: Path) -> None:
    done = assembled(padded_to_windows(), tmp_path)
    (site,) = done.sites
    assert (site.form, site.heads, site.query_axis, site.available) == ("windowed", 1, "seq", True)
    x = np.random.default_rng(2).normal(size=(2, length, WIDTH)).astype(np.float32)
    found = weights_of(done, site, x, 1)
    window = np.arange(length) // 4
    assert not found[..., window[:, None] != window].any()
    # Rows of whole windows sum to 1; those of the last window share a softmax with its padding.
    np.testing.assert_allclose(found[:, :, : length // 4 * 4].sum(-1), 1, atol=1e-6)


def test_channels_show_heads_where_no_value_is_a_sequence(tmp_path: Path) -> None:
    (site,) = assembled(grid_of_pixels(heads=4, windowed=False), tmp_path).sites
    assert (site.form, site.heads, site.available) == ("dense", 4, True)


def test_windows_that_no_run_distinguishes_from_heads_are_unavailable(tmp_path: Path) -> None:
    (site,) = assembled(grid_of_pixels(), tmp_path).sites
    assert site.unavailable_reason == "its weights may be of heads or of windows, which no run distinguishes"


def test_a_site_along_an_axis_of_the_inputs_is_not_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*arguments: object) -> dict[str, Followed]:
        raise AssertionError("there is nothing to distinguish")

    monkeypatch.setattr(room, "_followed", unexpected)
    made = Made()
    apart_heads = [made.op("Reshape", name, made.const(kind=np.int64, value=[0, 0, 2, -1])) for name in ("x", "y")]
    query, key = (made.op("Transpose", value, perm=[0, 2, 1, 3]) for value in apart_heads)
    scores = made.op("MatMul", query, made.op("Transpose", key, perm=[0, 1, 3, 2]))
    attended = made.op("MatMul", made.op("Softmax", scores, axis=-1), key)
    (site,) = assembled(made.model(made.op("Transpose", attended, perm=[0, 2, 1, 3])), tmp_path).sites
    assert site.heads == 2


@pytest.mark.parametrize("positions", [True, False])
def test_a_factor_is_split_into_the_fewest_that_differ_in_their_numbers(positions: bool) -> None:
    own, shared = ("window", "head") if positions else ("head", "window")
    axes = ((Factor("batch"), Factor("head", 6)), (Factor("query"),), (Factor("key"),))
    slow = np.repeat(np.arange(2), 3).reshape(1, 6, 1, 1) * np.ones((2, 1, 4, 4))
    fast = np.tile(np.arange(2), 3).reshape(1, 6, 1, 1) * np.ones((2, 1, 4, 4))
    tables = {name: table.reshape(12, 4, 4) for name, table in (("slow", slow), ("fast", fast))}
    split = apart(axes, Followed([tables["slow"]], positions), 2)[0]
    assert [(factor.role, factor.size) for factor in split[1:]] == [(own, 2), (shared, 3)]
    split = apart(axes, Followed([tables["fast"]], positions), 2)[0]
    assert [(factor.role, factor.size) for factor in split[1:]] == [(shared, 3), (own, 2)]
