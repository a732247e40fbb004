"""The catalog finds models by name and version, and only ready ones answer.

Manifests are made by hand, and `Gate` replaces each scheduler. An unknown model raises ModelNotFound, and one in
another state NotServing.
"""

from __future__ import annotations

import pytest
from attnserve_server.domain.errors import ModelNotFound, NotServing
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


def test_a_failed_highest_version_does_not_fall_back() -> None:
    old, new = model(version="1"), model(version="2")
    old.move(ModelState.READY)
    new.move(ModelState.FAILED, "broken")
    with pytest.raises(NotServing):
        catalog_of(old, new).get("tiny")
    assert catalog_of(old, new).get("tiny", "1") is old


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
