"""Faithfulness of maps: figures against NumPy float64 over models whose answer is known, and over the fake server.

`driver_class` runs a test with each client.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import numpy as np
import pytest
from attnserve_client import AttentionMap, AttentionSelection, InvalidRequest, Token
from attnserve_client._faithfulness import bootstrap, cosine, judge, plan, spearman
from attnserve_client.cli._app import app
from attnserve_client.testing import FakeServer
from attnserve_client.testing._answers import Unit, _vector
from typer.testing import CliRunner

TEXT = "The buyer pays all of it"
WORTH = {"The": 0.0, "buyer": 0.125, "pays": 0.5, "all": 0.25, "of": 0.03125, "it": 0.0625}
"""A model that adds a number for each word: its drops are sums, exact in float64."""


def additive(text: str) -> float:
    return sum(WORTH[word] for word in text.split())


def shown(text: str, weights: list[float]) -> AttentionMap:
    tokens, at = [], 0
    for index, word in enumerate(text.split()):
        at = text.index(word, at)
        tokens.append(Token(index, word, at, at + len(word)))
        at += len(word)
    raw = np.tile(np.array(weights, dtype=np.float32), (1, len(tokens), 1))
    return AttentionMap(("s",), 0, "self", "dense", (0,), "seq", "seq", tuple(tokens), tuple(tokens), raw)


def measured(weights: list[float], draws: int = 200) -> Any:
    planned = plan(TEXT, shown(TEXT, weights), (0.5,), draws, 1)
    return judge(planned, additive(TEXT), [additive(text) for text in planned.texts], "sum", 1)


def test_a_map_of_the_true_worths_has_the_greatest_comprehensiveness_there_is() -> None:
    found = measured(list(WORTH.values()))
    sets = [sum(WORTH[word] for word in each) for each in itertools.combinations(WORTH, 3)]
    assert found.comprehensiveness == max(sets) == 0.875
    assert found.sufficiency == additive(TEXT) - max(sets)
    assert found.leave_one_out == tuple(WORTH.values())
    assert found.rank_agreement == pytest.approx(1.0, abs=1e-12)
    expected = np.mean(sets)
    assert found.random_comprehensiveness.low < expected < found.random_comprehensiveness.high
    assert found.comprehensiveness_gain.low > 0
    assert found.sufficiency_gain.low > 0


def test_control_a_map_of_opposite_weights_is_worse_than_random() -> None:
    found = measured([1 - worth for worth in WORTH.values()])
    assert found.comprehensiveness == 0.0 + 0.03125 + 0.0625
    assert found.rank_agreement == pytest.approx(-1.0, abs=1e-12)
    assert found.comprehensiveness_gain.high < 0
    assert found.sufficiency_gain.high < 0


def test_intervals_shrink_with_the_draws() -> None:
    few, many = (measured([1, 2, 3, 4, 5, 6], draws).random_sufficiency for draws in (10, 1000))
    assert many.high - many.low < (few.high - few.low) / 4


def test_bootstrap_interval_is_about_the_normal_one_of_many_values() -> None:
    values = np.random.default_rng(5).normal(3, 2, 400)
    found = bootstrap(values, np.random.default_rng(1))
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean(), abs=1e-12)
    # 2,000 resamples give the bounds within a few percent of their distance.
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_rank_correlation_shares_ranks_of_equal_values() -> None:
    one, other = np.array([1.0, 2.0, 2.0, 3.0]), np.array([4.0, 1.0, 3.0, 2.0])
    ranks = np.array([1.0, 2.5, 2.5, 4.0]), np.array([4.0, 1.0, 3.0, 2.0])
    assert spearman(one, other) == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)
    assert np.isnan(spearman(np.ones(3), other[:3]))
    assert cosine(np.zeros(2), np.ones(2)) == 0.0


@pytest.mark.parametrize(
    ("text", "shares", "draws", "field"),
    [("one", (0.5,), 2, "text"), ("a b", (), 2, "shares"), ("a b", (1.0,), 2, "shares"), ("a b", (0.5,), 1, "draws")],
)
def test_invalid_measurements_name_their_field(text: str, shares: Any, draws: int, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan(text, shown(text, [1.0] * len(text.split())), shares, draws, 0)
    assert [each.field for each in caught.value.violations] == [field]


async def run(driver: Any, *arguments: Any, **options: Any) -> Any:
    method = driver.client.faithfulness
    if asyncio.iscoroutinefunction(method):
        return await method(*arguments, **options)
    return await asyncio.to_thread(method, *arguments, **options)


def fake_embedding(text: str) -> np.ndarray:
    """The fake model's embedding in float64, from its definition: the mean of a vector for each token, of length 1."""
    pieces = [("" if at == 0 else "##") + word[at : at + 6] for word in text.split() for at in range(0, len(word), 6)]
    units = [Unit("[CLS]"), *(Unit(piece, 0) for piece in pieces), Unit("[SEP]")]
    mean = np.mean([_vector(unit.text, 16).astype(np.float64) for unit in units], axis=0)
    return np.asarray(mean / np.linalg.norm(mean))


async def test_clients_agree_with_a_reference_over_the_fake_model(driver_class: Any, shared_server: FakeServer) -> None:
    driver = driver_class(shared_server.target)
    found = await run(driver, "fake", TEXT, shares=(0.34,), draws=3)
    words = TEXT.split()
    whole = fake_embedding(TEXT)
    drops = [1 - whole @ fake_embedding(" ".join(words[:at] + words[at + 1 :])) for at in range(len(words))]
    assert found.measure == "cosine of embedding"
    assert found.words == tuple(words)
    # The server sends float32: 1e-6 is ten times its rounding of a cosine.
    np.testing.assert_allclose(found.leave_one_out, drops, atol=1e-6)
    top = set(np.argsort(-np.array(found.weights), kind="stable")[:2].tolist())
    rest = " ".join(word for at, word in enumerate(words) if at not in top)
    kept = " ".join(word for at, word in enumerate(words) if at in top)
    assert found.comprehensiveness == pytest.approx(1 - whole @ fake_embedding(rest), abs=1e-6)
    assert found.sufficiency == pytest.approx(1 - whole @ fake_embedding(kept), abs=1e-6)
    await driver.close()


async def test_models_with_labels_are_measured_by_their_best_label(driver_class: Any) -> None:
    with FakeServer(labels=("good", "bad")) as server:
        driver = driver_class(server.target)
        whole = (await driver.infer("fake", TEXT, labels={"top_k": 2})).labels
        found = await run(driver, "fake", TEXT, draws=2)
        assert found.measure == f"label {whole[0].text}"
        without_first = (await driver.infer("fake", TEXT.split(" ", 1)[1], labels={"top_k": 2})).labels
        score = next(each.score for each in without_first if each.text == whole[0].text)
        assert found.leave_one_out[0] == pytest.approx(whole[0].score - score, abs=1e-6)
        assert (await run(driver, "fake", TEXT, draws=2, output="embedding")).measure == "cosine of embedding"
        with pytest.raises(InvalidRequest, match="'other' is not one of embedding"):
            await run(driver, "fake", TEXT, output="other")
        await driver.close()


async def test_selection_of_several_maps_is_refused(driver_class: Any, shared_server: FakeServer) -> None:
    driver = driver_class(shared_server.target)
    with pytest.raises(InvalidRequest, match="it selects 2 maps"):
        await run(driver, "fake", TEXT, attention=AttentionSelection())
    await driver.close()


def test_command_prints_words_drops_and_intervals(shared_server: FakeServer) -> None:
    line = ["faithfulness", "fake", TEXT, "--draws", "3", "--server", shared_server.target]
    shown_text = CliRunner().invoke(app, line, env={"COLUMNS": "80"})
    assert shown_text.exit_code == 0, shown_text.output
    assert "Drops of the cosine of embedding, means over 10%, 20%, 50% of the words" in shown_text.stdout
    assert max(map(len, shown_text.stdout.splitlines())) <= 80
    found = json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)
    assert found["words"] == TEXT.split()
    assert found["comprehensiveness_gain"]["low"] <= found["comprehensiveness_gain"]["high"]
    failed = CliRunner().invoke(app, ["faithfulness", "fake", "one", "--server", shared_server.target])
    assert failed.exit_code == 3
