"""The catalog: the models by name and version, the state of each, and its scheduler. Others load and add them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from attnserve_server.domain.errors import ModelFailed, ModelNotFound, NotServing
from attnserve_server.domain.values import PreparedSequence, Priority, SequenceResult
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.tokenizer import TextTokenizer
from attnserve_server.observability.metrics import ModelMetrics
from attnserve_server.scheduling.admission import Load
from attnserve_server.scheduling.queue import Request


class ModelState(StrEnum):
    """Whether a model answers requests, and why not."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Submitter(Protocol):
    """What the data plane needs of a model's scheduler."""

    def load(self) -> Load:
        """Return what waits and runs now, as a request at the end of the whole queue meets it."""
        ...

    def check_room(self, deadline: float | None, caller: str = "") -> None:
        """Raise what `submit` would raise now for the smallest request."""
        ...

    def submit(
        self, request: Request, sequences: Sequence[PreparedSequence], priority: Priority
    ) -> asyncio.Future[list[SequenceResult]]:
        """Queue a request, and return the future of its results, in order, or of its error.

        Cancelling the future, or the task that awaits it, withdraws the sequences.
        """
        ...


@dataclass(slots=True, eq=False)
class Statistics:
    """Counts and times of the requests that this process answered. Event loop only."""

    requests: int = 0
    failed: int = 0
    sequences: int = 0
    runs: float = 0.0
    """Each sequence counts with its share of the run, so that a run that requests share counts once."""
    seconds: float = 0.0
    """From the arrival of each request to its answer."""
    queue_s: float = 0.0
    compute_s: float = 0.0
    """Times of each sequence, added up."""
    last_s: float | None = None
    """When the last request was answered, in monotonic seconds; None: none was."""

    def add(self, results: Sequence[SequenceResult], arrived_s: float, now: float) -> None:
        """Count one request that arrived and was answered at these monotonic seconds."""
        self.requests += 1
        self.seconds += now - arrived_s
        self.last_s = now
        for result in results:
            run = result.run
            self.sequences += 1
            self.runs += 1 / run.batch_size
            self.queue_s += result.queue_s
            self.compute_s += run.compute_s


@dataclass(slots=True, eq=False)
class ServedModel:
    """One model and its scheduler. Event loop only.

    `manifest`, under the server's batching policy, is None for a folder that is no bundle; `scheduler` is None until
    the model is ready. `max_request_size`: the most sequences of one request, which may be more than one run takes; 0:
    the manifest's `max_batch_size`.
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
    """Why it failed or loads again; in READY, why each sequence runs alone."""
    died: bool = False
    """Whether it failed while it served, so that a retry at another replica may succeed."""
    is_replaced: bool = False
    """Whether its engine is being replaced: requests wait for the next one."""
    statistics: Statistics = field(default_factory=Statistics)
    prepared: int = 0
    """Requests that were read and are not submitted yet: its scheduler must not drain before they are."""

    def move(self, state: ModelState, reason: str = "") -> None:
        """Enter a state, and set the model's metrics accordingly."""
        self.died = state is ModelState.FAILED and (self.died or self.state in (ModelState.READY, ModelState.DRAINING))
        self.state, self.state_reason = state, reason
        self.metrics.state(state.value)

    def serving(self) -> tuple[Manifest, Submitter]:
        """Return the manifest and the scheduler of a model that is ready.

        Raises:
            NotServing: It is loading or draining, or failed while it served.
            ModelFailed: It could not be loaded.
        """
        if self.state is ModelState.FAILED and not self.died:
            raise ModelFailed(self.name, self.version, self.state_reason)
        serves = self.state is ModelState.READY or self.is_replaced
        if not serves or self.manifest is None or self.scheduler is None:
            raise NotServing(self.name, self.state.value)
        return self.manifest, self.scheduler


class Catalog:
    """All models, ready or not. Event loop only."""

    def __init__(self) -> None:
        # The versions of a model, from the highest.
        self._models: dict[str, dict[str, ServedModel]] = {}

    def add(self, model: ServedModel) -> None:
        """Add a model. Raises ValueError if the catalog has its name and version already."""
        versions = self._models.get(model.name, {})
        if model.version in versions:
            raise ValueError(f"model {model.name}/{model.version} is in the catalog already")
        self._models[model.name] = dict(sorted({**versions, model.version: model}.items(), key=_number, reverse=True))

    def replace(self, model: ServedModel) -> None:
        """Put a model in the place of the same version, or add it."""
        self._models.get(model.name, {}).pop(model.version, None)
        self.add(model)

    def remove(self, model: ServedModel) -> None:
        """Remove a model, if the catalog has this very one."""
        versions = self._models.get(model.name, {})
        if versions.get(model.version) is model:
            del versions[model.version]
        if not versions:
            self._models.pop(model.name, None)

    def find(self, name: str, version: str = "") -> ServedModel:
        """Return a model in any state.

        Without a version, it is the highest that is ready; if none is, the highest that may become ready; else the
        highest.

        Raises:
            ModelNotFound: The catalog has none of that name, or not this version.
        """
        versions = self._models.get(name)
        if versions is None or (version and version not in versions):
            raise ModelNotFound(name, version)
        if version:
            return versions[version]
        for model in versions.values():
            if model.state is ModelState.READY:
                return model
        pending = (model for model in versions.values() if model.state is not ModelState.FAILED)
        return next(pending, next(iter(versions.values())))

    def get(self, name: str, version: str = "") -> ServedModel:
        """Return a model that is ready.

        Raises:
            ModelNotFound: The catalog has none of that name, or not this version.
            NotServing: It is loading or draining, or failed while it served.
            ModelFailed: It could not be loaded.
        """
        model = self.find(name, version)
        model.serving()
        return model

    def all(self) -> list[ServedModel]:
        """Return all models in order of name and version."""
        return [model for name in sorted(self._models) for model in reversed(self._models[name].values())]

    def ready(self) -> list[ServedModel]:
        """Return the models that are ready, in the same order."""
        return [model for model in self.all() if model.state is ModelState.READY]

    def serves(self, ready: str, *, started: bool) -> bool:
        """Return whether the server as a whole is ready.

        Args:
            ready: `any`: one model that is ready is enough; `all`: each name needs a version that is.
            started: whether it was ready before. If not, `all` needs every version. Later, a new version that is
                loading or failed changes nothing while an older one serves.
        """
        states = [{model.state for model in versions.values()} for versions in self._models.values()]
        if ready == "any":
            return any(ModelState.READY in found for found in states)
        if started:
            return bool(states) and all(ModelState.READY in found for found in states)
        return bool(states) and all(found == {ModelState.READY} for found in states)

    def drain(self) -> None:
        """Move every model that is ready, or whose engine is being replaced, to DRAINING."""
        for model in self.all():
            if model.state is ModelState.READY or model.is_replaced:
                model.move(ModelState.DRAINING)
                model.is_replaced = False


def _number(version: tuple[str, ServedModel]) -> int:
    return int(version[0])
