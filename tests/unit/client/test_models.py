"""Descriptions of models as the client decodes them, and readiness, which is that of each model's highest version.

Messages are made by hand. No server runs, and nothing raises.
"""

from __future__ import annotations

import io

from attnserve.v1 import model_pb2
from attnserve_client import ModelInfo
from attnserve_client._models import model_of, why_not_ready
from attnserve_client.cli._show import show_model
from attnserve_client.data_types import PatchGrid
from rich.console import Console


def test_readiness_is_that_of_the_highest_version_of_each_model() -> None:
    def version(number: str, state: int, name: str = "m") -> ModelInfo:
        return model_of(model_pb2.Model(name=name, version=number, state=state))

    ready, loading = model_pb2.MODEL_STATE_READY, model_pb2.MODEL_STATE_LOADING
    assert why_not_ready([]) == "the server has no models"
    assert not why_not_ready([version("10", ready), version("9", loading)])
    assert not why_not_ready([version("9", ready), version("10", loading)])
    assert why_not_ready([version("9", loading), version("10", loading)]) == "model 'm' is loading"
    assert why_not_ready([version("1", ready), version("1", loading, "other")]) == "model 'other' is loading"
    assert why_not_ready([version("odd", loading)]) == "model 'm' is loading"
    failed = model_pb2.Model(name="m", state=model_pb2.MODEL_STATE_FAILED, state_reason="no manifest")
    assert why_not_ready([model_of(failed)]) == "model 'm' is failed: no manifest"


def test_model_description_has_grids_vocabularies_and_text_axes() -> None:
    info = model_of(
        model_pb2.Model(
            name="clip",
            axes=[model_pb2.Axis(symbol="patches", max_length=7, grid_rows=2, grid_columns=3, leading=1)],
            inputs=[model_pb2.TensorSpec(name="input_ids", vocabulary_size=50)],
            text_axis="source",
            text_pair_axis="target",
        )
    )
    assert info.axes[0].grid == PatchGrid(2, 3, 1)
    assert info.inputs[0].vocabulary_size == 50
    console = Console(width=200, record=True, file=io.StringIO())
    show_model(console, info)
    shown = console.export_text()
    assert "axis   patches, at most 7, not padded, 2 × 3 patches" in shown
    assert "texts  along source and, of a pair, target" in shown
    assert "batch  " not in shown, "the server reports no batching"


def test_model_description_has_the_batching_status_and_policy() -> None:
    info = model_of(
        model_pb2.Model(
            name="int8",
            batching_policy=model_pb2.BATCHING_POLICY_PROVED,
            batch_status=model_pb2.BATCHING_STATUS_REFUTED,
            batch_reason="one scale for all rows",
            axes=[
                model_pb2.Axis(
                    symbol="seq",
                    max_length=9,
                    paddable=True,
                    padding_status=model_pb2.BATCHING_STATUS_TESTED,
                    padding_reason="finite mask, unbounded scores",
                )
            ],
        )
    )
    assert (info.batching, info.batched, info.batch_status) == ("proved", False, "refuted")
    assert info.batch_reason == "one scale for all rows"
    assert (info.axes[0].padding_status, info.axes[0].padding_reason) == ("tested", "finite mask, unbounded scores")
    console = Console(width=200, record=True, file=io.StringIO())
    show_model(console, info)
    shown = console.export_text()
    assert "axis   seq, at most 9, padded (tested: finite mask, unbounded scores)" in shown
    assert "batch  every sequence runs alone (refuted: one scale for all rows), under the policy 'proved'" in shown
