"""Features of attention: selection, decoding, tables and figures; and scores.

A feature is a number computed from a row of weights, such as its entropy. Scores are the numbers whose softmax is the
weights. The test of the figure is skipped without matplotlib.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest
from attnserve.v1 import inference_service_pb2 as wire
from attnserve_client import AttentionFeatures, AttentionSelection, Client, InferenceResult, InvalidRequest
from attnserve_client._features import SiteFeatures
from attnserve_client._results import results_of
from attnserve_client.cli._app import app
from attnserve_client.errors import BadAnswer
from attnserve_client.testing import FakeServer
from typer.testing import CliRunner, Result

NAMES = ("entropy", "top1_share", "first_token", "mean_distance")
TEXT = "some wonderful text"
# Weights are rounded to float32 before the reference sums them, and features after the fake server sums them.
TOLERANCE = 1e-5


def answer(server: FakeServer, **selection: Any) -> InferenceResult:
    """Return the fake server's result for this selection of attention."""
    with Client(server.target) as client:
        return client.infer("fake", TEXT, outputs=[], attention=AttentionSelection(**selection))


def features(server: FakeServer, **selection: Any) -> AttentionFeatures:
    """Return the features of a selection, by default all four; fails unless their predicted size is right."""
    result = answer(server, **{"features": NAMES, **selection})
    assert result.features is not None
    assert result.attention == []
    assert result.predicted_bytes == sum(each.values.nbytes for each in result.features.sites)
    return result.features


@pytest.mark.parametrize("selection", [{}, {"unit": "word", "special_tokens": "drop"}, {"queries": [-1], "heads": [1]}])
def test_features_are_those_of_the_map_for_the_same_selection(
    shared_server: FakeServer, selection: dict[str, Any]
) -> None:
    found = features(shared_server, **selection)
    for each, attention in zip(found.sites, answer(shared_server, **selection).attention, strict=True):
        weights = attention.weights.astype(float)
        queries, keys = ([token.index for token in tokens] for tokens in (each.query_tokens, each.key_tokens))
        distances = np.abs(np.subtract.outer(queries, keys))
        for name, expected in {
            "entropy": -(weights * np.log(weights)).sum(axis=2),
            "top1_share": weights.max(axis=2),
            "first_token": weights[:, :, 0],
            "mean_distance": (weights * distances).sum(axis=2),
        }.items():
            np.testing.assert_allclose(each[name], expected, rtol=0, atol=TOLERANCE)
        assert (each.site, each.layer, each.heads) == (attention.sites[0], attention.layer, attention.heads)
        assert (each.query_tokens, each.key_tokens) == (attention.query_tokens, attention.key_tokens)


def test_a_selection_of_features_survives_the_wire_and_names_its_fault() -> None:
    assert AttentionSelection(features="entropy") == AttentionSelection(features=["entropy"])
    selection = AttentionSelection(features=NAMES)  # type: ignore[arg-type]
    assert AttentionSelection.from_wire(selection.to_wire()) == selection
    with pytest.raises(InvalidRequest, match=r"attention.features\[1\]: 'variance' is not one of entropy"):
        AttentionSelection(features=["entropy", "variance"]).to_wire()  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"heads": "mean"}, "head_reduction"),
        ({"layer_reduction": "rollout"}, "layer_reduction"),
        ({"top_k": 3}, "top_k"),
        ({"dtype": "uint8"}, "dtype"),
        ({"features": ["entropy", "entropy"]}, "features[1]"),
    ],
)
def test_the_fake_server_refuses_what_features_exclude(
    shared_server: FakeServer, fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        features(shared_server, **fields)
    assert refused.value.violations[0].field == f"attention.{field}"


def test_dry_runs_and_requests_without_features_have_none(shared_server: FakeServer) -> None:
    assert answer(shared_server).features is None
    with Client(shared_server.target) as client:
        dry = client.infer("fake", TEXT, attention=AttentionSelection(features=NAMES), validate_only=True)  # type: ignore[arg-type]
    assert dry.features is None
    assert dry.predicted_bytes > 0


def site(heads: int, value: float = 1.0, layer: int = 0) -> SiteFeatures:
    values = np.full((heads, 0, 1), value, np.float32)
    return SiteFeatures(
        f"s{layer}", layer, "self", "dense", tuple(range(heads)), "seq", "seq", (), (), ("entropy",), values
    )


def test_features_stack_by_layer_and_average_by_head(shared_server: FakeServer) -> None:
    found = features(shared_server)
    stacked = found.to_numpy()
    assert stacked.shape == (2, 4, len(found.sites[0].query_tokens), 4)
    np.testing.assert_allclose(found.by_head("top1_share"), stacked[..., 1].mean(axis=2), rtol=0, atol=TOLERANCE)
    with pytest.raises(KeyError, match="'variance' is not one of the selected features: entropy"):
        found.by_head("variance")
    apart = AttentionFeatures("m", ("entropy",), (site(2), site(3)))
    assert np.isnan(apart.by_head("entropy")).all()  # no queries
    with pytest.raises(ValueError, match="select fewer sites"):
        apart.to_numpy()


def test_representations_are_short(shared_server: FakeServer) -> None:
    found = features(shared_server)
    assert repr(found) == f"AttentionFeatures(model='fake', names={NAMES})"
    assert len(repr(found.sites[0])) < 200


def test_plain_features_have_null_for_what_is_no_number(shared_server: FakeServer) -> None:
    plain = features(shared_server).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert np.array(plain["sites"][1]["values"]).shape == features(shared_server).sites[1].values.shape
    undefined = SiteFeatures("s", 0, "self", "dense", (0,), "q", "k", (), (), ("entropy",), np.full((1, 1, 1), np.nan))
    assert undefined.to_dict()["values"] == [[[None]]]


def test_features_of_another_shape_are_a_bad_answer(server: FakeServer) -> None:
    selection = AttentionSelection(features=NAMES).to_wire()  # type: ignore[arg-type]
    sequence = wire.Sequence(text=wire.TextInput(text=TEXT))
    response = server.answer(wire.InferRequest(model="fake", sequences=[sequence], attention=selection))
    assert results_of(response, 1, validate_only=False)[0].features is not None
    response.effective_attention.features.pop()
    with pytest.raises(BadAnswer, match="not float32 of shape"):
        results_of(response, 1, validate_only=False)


def run(server: FakeServer, *line: str) -> Result:
    environment = {"ATTNSERVE_SERVER": server.target, "COLUMNS": "80"}
    return CliRunner().invoke(app, ["features", "fake", TEXT, *line], env={**os.environ, **environment})


def test_the_command_prints_layers_by_heads(shared_server: FakeServer) -> None:
    shown = run(shared_server)
    assert shown.exit_code == 0, shown.output
    assert [name for name in NAMES if name in shown.stdout] == list(NAMES)
    means = features(shared_server).by_head("entropy")
    row = next(line for line in shown.stdout.splitlines() if line.strip().startswith("1 "))
    assert f"{means[1, 0]:.3f}" in row
    assert f"{means[1, 3]:.3f}" in row


def test_the_command_prints_json(shared_server: FakeServer) -> None:
    shown = run(
        shared_server, "--json", "--feature", "mean_distance", "--layer", "-1", "--unit", "word", "--drop-special"
    )
    plain = json.loads(shown.stdout)
    assert (plain["receipt"]["model"], plain["features"]) == ("fake", ["mean_distance"])
    assert [each["layer"] for each in plain["sites"]] == [1]
    assert [each["text"] for each in plain["sites"][0]["queries"]] == TEXT.split()


def test_a_figure_has_layers_down_and_heads_across(shared_server: FakeServer) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'attnserve[plot]'")
    axes = features(shared_server).plot("entropy").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1"]
    np.testing.assert_array_equal(axes.images[0].get_array(), features(shared_server).by_head("entropy"))


@pytest.mark.parametrize("window", [None, 1])
def test_softmax_of_scores_gives_the_weights(window: int | None) -> None:
    with FakeServer(window=window) as server:
        for scored, weighed in zip(answer(server, values="scores").attention, answer(server).attention, strict=True):
            exponentials = np.exp(scored.scores.astype(float))
            softmax = exponentials / exponentials.sum(axis=-1, keepdims=True)
            np.testing.assert_allclose(softmax, weighed.weights, rtol=0, atol=TOLERANCE)
            assert (np.isneginf(scored.scores) == (weighed.weights == 0)).all()
            assert (scored.band is None) == (window is None)


def test_a_map_of_scores_is_no_map_of_weights(shared_server: FakeServer) -> None:
    scored = answer(shared_server, values="scores").attention[0]
    weighed = answer(shared_server).attention[0]
    plain = scored.to_dict()
    assert (plain["scores"], "weights" in plain) == (scored.scores.tolist(), False)
    assert scored._repr_html_() is None
    for wrong in (lambda: scored.weights, scored.links, scored.to_html, lambda: weighed.scores):
        with pytest.raises(ValueError, match="this map holds"):
            wrong()
    with FakeServer(window=1) as server:
        assert None in answer(server, values="scores", queries=[0]).attention[0].to_dict()["scores"][0][0]


@pytest.mark.parametrize("fields", [{"unit": "word"}, {"layer_reduction": "rollout"}, {"features": "entropy"}])
def test_the_fake_server_refuses_what_scores_exclude(shared_server: FakeServer, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        answer(shared_server, values="scores", **fields)
