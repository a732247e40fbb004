"""The catalog finds models by name and version, and only ready ones answer.

Manifests are made by hand, and `Gate` replaces each scheduler. An unknown model raises ModelNotFound, one that could
not be loaded ModelFailed, and one in another state NotServing.
"""

from __future__ import annotations

import pytest
from attnserve_server.domain.errors import ModelFailed, ModelNotFound, NotServing
from attnserve_server.observability.metrics import Metrics
from attnserve_server.scheduling.catalog import Catalog, ModelState, ServedModel
from gated import Gate
from tiny_bundle import tiny_manifest

METRICS = Metrics()


def model(name: str = "tiny", version: str = "1") -> ServedModel:
    """A model that is not loaded yet; its scheduler is a `Gate`."""
    manifest = tiny_manifest(name, version)
    return ServedModel(name, version, METRICS.model(name, version), manifest, scheduler=Gate(manifest))


def catalog_of(*models: ServedModel) -> Catalog:
    catalog = Catalog()
    for each in models:
        catalog.add(each)
    return catalog


def test_no_version_means_the_highest_by_number_and_not_by_spelling() -> None:
    catalog = catalog_of(*(model(version=version) for version in ("9", "10", "2")))
    assert catalog.find("tiny").version == "10"
    assert catalog.find("tiny", "2").version == "2"


@pytest.mark.parametrize(("name", "version"), [("nope", ""), ("tiny", "3"), ("nope", "1")])
def test_an_unknown_model_is_not_found(name: str, version: str) -> None:
    with pytest.raises(ModelNotFound):
        catalog_of(model()).find(name, version)


@pytest.mark.parametrize("state", [ModelState.LOADING, ModelState.DRAINING, ModelState.FAILED])
def test_only_a_ready_model_answers(state: ModelState) -> None:
    served = model()
    served.move(ModelState.READY)
    assert catalog_of(served).get("tiny") is served
    served.move(state, "why")
    with pytest.raises(NotServing, match=f"model 'tiny' is {state.value}"):
        catalog_of(served).get("tiny")
    assert served.state_reason == "why"


def test_a_model_that_could_not_be_loaded_reports_why_and_no_retry() -> None:
    served = model(version="3")
    served.move(ModelState.FAILED, "its file is cut short")
    with pytest.raises(ModelFailed, match="model 'tiny', version '3', could not be loaded: its file is cut short"):
        catalog_of(served).get("tiny")
    served.move(ModelState.LOADING)
    served.move(ModelState.READY)
    assert catalog_of(served).get("tiny") is served


@pytest.mark.parametrize("state", [ModelState.LOADING, ModelState.DRAINING, ModelState.FAILED])
def test_the_default_is_the_highest_version_that_is_ready(state: ModelState) -> None:
    old, ready, new = (model(version=version) for version in ("9", "10", "11"))
    for each in (old, ready):
        each.move(ModelState.READY)
    new.move(state, "broken")
    catalog = catalog_of(old, new, ready)
    assert catalog.get("tiny") is ready
    assert catalog.find("tiny", "11") is new
    new.move(ModelState.READY)
    assert catalog.get("tiny") is new


def test_without_a_ready_version_the_default_is_one_that_may_become_ready() -> None:
    loading, broken = model(version="1"), model(version="2")
    loading.move(ModelState.LOADING)
    broken.move(ModelState.FAILED, "broken")
    assert catalog_of(loading, broken).find("tiny") is loading
    loading.move(ModelState.FAILED, "broken too")
    assert catalog_of(loading, broken).find("tiny") is broken


READY, FAILED, LOADING = ModelState.READY, ModelState.FAILED, ModelState.LOADING


@pytest.mark.parametrize(
    ("states", "any_serves", "all_serve", "all_serve_later"),
    [
        ({}, False, False, False),
        ({("a", "1"): READY, ("b", "1"): READY}, True, True, True),
        ({("a", "1"): READY, ("b", "1"): FAILED}, True, False, False),
        ({("a", "1"): READY, ("a", "2"): FAILED}, True, False, True),
        ({("a", "1"): READY, ("a", "2"): LOADING}, True, False, True),
        ({("a", "1"): FAILED}, False, False, False),
    ],
    ids=["none", "all ready", "one name failed", "new version failed", "new version loading", "all failed"],
)
def test_the_server_is_ready_with_one_or_with_all_models(
    states: dict[tuple[str, str], ModelState], any_serves: bool, all_serve: bool, all_serve_later: bool
) -> None:
    catalog = Catalog()
    for (name, version), state in states.items():
        served = model(name, version)
        served.move(state)
        catalog.add(served)
    assert catalog.serves("any", started=False) is any_serves
    assert catalog.serves("all", started=False) is all_serve
    assert catalog.serves("all", started=True) is all_serve_later


def test_models_are_listed_by_name_and_then_version() -> None:
    catalog = catalog_of(model("b", "10"), model("b", "9"), model("a", "3"))
    assert [(each.name, each.version) for each in catalog.all()] == [("a", "3"), ("b", "9"), ("b", "10")]


def test_a_version_can_be_added_once() -> None:
    with pytest.raises(ValueError, match="tiny/1 is in the catalog already"):
        catalog_of(model(), model())


def test_a_model_state_is_set_in_the_metrics() -> None:
    served = model("moved", "1")
    served.move(ModelState.DRAINING)

    def value(state: str) -> float | None:
        labels = {"model": "moved", "version": "1", "state": state}
        return METRICS.registry.get_sample_value("attnserve_model_state", labels)

    assert [value(state.value) for state in ModelState] == [0, 0, 1, 0]


def test_a_model_whose_engine_is_replaced_takes_requests_until_it_drains() -> None:
    one = model()
    catalog = catalog_of(one)
    one.move(ModelState.LOADING)
    with pytest.raises(NotServing):
        one.serving()
    one.is_replaced = True
    assert one.serving()[1] is one.scheduler
    assert catalog.ready() == [], "health must not report it"
    catalog.drain()
    with pytest.raises(NotServing, match="draining"):
        one.serving()
