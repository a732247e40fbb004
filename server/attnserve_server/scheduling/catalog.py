"""The catalog: which models there are, in what state, and who runs them. Loading them is the application's work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from attnserve_server.domain.errors import ModelNotFound, NotServing
from attnserve_server.domain.values import PreparedSequence, Priority, SequenceResult
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.tokenizer import TextTokenizer
from attnserve_server.observability.metrics import ModelMetrics


class ModelState(StrEnum):
    """What a model is doing."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Submitter(Protocol):
    """Something that runs sequences: a model's scheduler."""

    def check_room(self, deadline: float | None) -> None:
        """Raises what `submit` would raise now for the smallest of requests."""
        ...

    async def submit(
        self,
        sequences: Sequence[PreparedSequence],
        *,
        deadline: float | None,
        priority: Priority,
        received_bytes: int,
        request_id: str,
    ) -> list[SequenceResult]:
        """The answers in the same order; raises the errors of the domain. Cancelling it withdraws the sequences."""
        ...


@dataclass(slots=True, eq=False)
class ServedModel:
    """One model and what runs it. Event loop only.

    `manifest`, under the server's batching policy, is None for a folder that is no bundle; `scheduler` is there once
    the model is ready. `max_request_size`: the most sequences of one request, which may be more than one run takes; 0:
    as many as the manifest has it.
    """

    name: str
    version: str
    metrics: ModelMetrics
    manifest: Manifest | None = None
    max_request_size: int = 0
    tokenizer: TextTokenizer | None = None
    scheduler: Submitter | None = None
    provider: str = ""
    state: ModelState = ModelState.LOADING
    state_reason: str = ""
    """Why it failed or, where it is ready, why each sequence runs alone."""

    def move(self, state: ModelState, reason: str = "") -> None:
        """Puts the model into a state, and says so in its metrics."""
        self.state, self.state_reason = state, reason
        self.metrics.state(state.value)

    def serving(self) -> tuple[Manifest, Submitter]:
        """What answers requests now.

        Raises:
            NotServing: It is loading, draining or failed.
        """
        if self.state is not ModelState.READY or self.manifest is None or self.scheduler is None:
            raise NotServing(self.name, self.state.value)
        return self.manifest, self.scheduler


class Catalog:
    """All models, ready or not. Event loop only."""

    def __init__(self) -> None:
        self._models: dict[str, dict[str, ServedModel]] = {}

    def add(self, model: ServedModel) -> None:
        """Adds a model. Raises ValueError if its name and version are there already."""
        versions = self._models.setdefault(model.name, {})
        if model.version in versions:
            raise ValueError(f"model {model.name}/{model.version} is in the catalog already")
        versions[model.version] = model

    def find(self, name: str, version: str = "") -> ServedModel:
        """The model in whatever state; the highest version if none is named.

        Raises:
            ModelNotFound: There is none.
        """
        versions = self._models.get(name, {})
        found = versions.get(version) if version else max(versions.values(), key=_rank, default=None)
        if found is None:
            raise ModelNotFound(name, version)
        return found

    def get(self, name: str, version: str = "") -> ServedModel:
        """The model, ready to answer.

        Raises:
            ModelNotFound: There is none.
            NotServing: It is loading, draining or failed.
        """
        model = self.find(name, version)
        model.serving()
        return model

    def all(self) -> list[ServedModel]:
        """All models in order of name and version."""
        return [model for name in sorted(self._models) for model in sorted(self._models[name].values(), key=_rank)]


def _rank(model: ServedModel) -> int:
    return int(model.version)
