"""Keys without a position, before or behind those of the sequence: their axis, their weights, and padding.

`Appended` makes a graph of attention whose layer adds such keys, as zeros or learned biases. Each test converts one,
and reads the weights that it returns or the axes of its manifest.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from appended_keys import Appended
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.manifest import DerivedLength
from attnserve_server.model.repository import Bundle
from limited_graphs import WIDTH
from onnx_files import saved

pytestmark = pytest.mark.slow

BEHIND = [Appended(), Appended(zeros=0, biases=1), Appended(biases=1), Appended(zeros=3), Appended(sharp=8.0)]
BEFORE = [Appended(before=True), Appended(zeros=0, biases=2, before=True), Appended(sharp=8.0, before=True)]


def prepared(case: Appended, folder: Path) -> Bundle:
    file = saved(case.model(), folder / "appended.onnx")
    return prepare_bundle(PrepareRequest(file=file, name="appended", repository=folder / "models", max_length=64))


def weights_of(bundle: Bundle, x: np.ndarray) -> np.ndarray:
    (site,) = bundle.manifest.sites
    session = RuntimeSession.load(bundle.model_path, provider="CPUExecutionProvider", intra_op_threads=1)
    feeds = {"x": x, "mask": np.ones(x.shape[:2], np.int64), str(site.items_input): np.arange(len(x))}
    (found,) = session.run(feeds, [str(site.weights_output)])
    return found[:, 0]


@pytest.mark.parametrize("case", [*BEHIND, *BEFORE], ids=str)
def test_keys_without_a_position_have_weights_and_lengthen_the_key_axis(case: Appended, tmp_path: Path) -> None:
    bundle = prepared(case, tmp_path)
    (site,) = bundle.manifest.sites
    assert (site.available, site.kind, site.query_axis) == (True, "self", "seq")
    assert site.key_axis == f"seq_plus_{case.count}"
    assert bundle.manifest.axis(site.key_axis).derived == DerivedLength(source="seq", stride=1, offset=case.count)
    x = np.random.default_rng(2).normal(size=(2, 5, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(weights_of(bundle, x), case.reference(x), rtol=0, atol=1e-5)


def test_queries_of_zero_give_the_appended_key_the_same_weight_as_any_other(tmp_path: Path) -> None:
    found = weights_of(prepared(Appended(), tmp_path), np.zeros((1, 4, WIDTH), np.float32))
    np.testing.assert_allclose(found, np.full((1, 4, 5), 0.2), rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", BEHIND, ids=str)
def test_sequences_are_not_padded_where_keys_follow_the_padding(case: Appended, tmp_path: Path) -> None:
    axes = prepared(case, tmp_path).manifest.axes
    assert [(axis.symbol, axis.paddable) for axis in axes] == [("seq", False), (f"seq_plus_{case.count}", False)]


@pytest.mark.parametrize("case", BEFORE, ids=str)
def test_sequences_are_padded_where_keys_precede_them(case: Appended, tmp_path: Path) -> None:
    axes = prepared(case, tmp_path).manifest.axes
    assert [(axis.symbol, axis.paddable) for axis in axes] == [("seq", True), (f"seq_plus_{case.count}", True)]
