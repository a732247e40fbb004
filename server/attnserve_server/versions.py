"""The versions of models that a server holds, and their states in catalog, health and metrics.

It loads nothing: `lifecycle` does. A name and version that is not held raises KeyError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from attnserve_server.config import Settings
from attnserve_server.model.repository import Bundle, BundleFault
from attnserve_server.observability.logs import logger
from attnserve_server.observability.metrics import (
    ENGINE_REASONS,
    ENGINE_RESTARTS,
    FRONT_REASONS,
    FRONT_RESTARTS,
    Metrics,
)
from attnserve_server.observability.spec import MODEL_LOADS
from attnserve_server.scheduling.catalog import Catalog, ModelState, ServedModel
from attnserve_server.transport.admin import Change, Outcome
from attnserve_server.transport.health import OVERALL, Health
from attnserve_server.transport.servicer import SERVICE
from attnserve_server.wanted import log_cautions, under_policy

_log = logger(__name__)

Key = tuple[str, str]
"""Name and version."""


class Running(Protocol):
    """What runs a version that serves."""

    def why_hung(self, now: float) -> str:
        """Return why one of its runs counts as hung, if nothing ends such a run; empty: none does."""
        ...

    async def retire(self) -> None:
        """End it after its last request, at most the grace period later. It gets no new ones."""
        ...


@dataclass(slots=True, eq=False)
class Version:
    """What the server holds of one version.

    `stored`: its bundle as it was found; None: its manifest is broken. `running`: None unless it serves. `hangs`: why
    one of its runs counts as hung; empty: none does.
    """

    served: ServedModel
    stored: Bundle | None = None
    running: Running | None = None
    hangs: str = ""


class Versions:
    """What the server holds. Event loop only."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        catalog: Catalog,
        health: Health,
        *,
        shown: Callable[[ServedModel], None],
        forget: Callable[[ServedModel], None],
        counted: Metrics,
        reachable: Callable[[], bool],
    ) -> None:
        """Begin without models.

        Args:
            settings: of the server.
            metrics: for the facts of models.
            catalog: gets the models.
            health: gets their states.
            shown: called when a model of the catalog has entered a state.
            forget: called with each model that the catalog has no more.
            counted: counts changes; `metrics`, unless that is the sum over several processes.
            reachable: whether callers reach the server at all.
        """
        self._settings = settings
        self._metrics = metrics
        self._counted = counted
        self._catalog = catalog
        self._health = health
        self._shown = shown
        self._forget = forget
        self._reachable = reachable
        self._serves = False
        self._begun = False
        for reason in FRONT_REASONS:
            counted.counter(FRONT_RESTARTS).labels(reason)
        self._outcomes = {outcome: counted.counter(MODEL_LOADS).labels(outcome.value) for outcome in Outcome}
        self.held: dict[Key, Version] = {}

    def begin(self) -> None:
        """Report the health of the server from now on: all models have been loaded or have failed."""
        self._begun = True
        self.report()

    def holds(self, model: ServedModel) -> bool:
        """Return whether this very model is held of its version."""
        held = self.held.get((model.name, model.version))
        return held is not None and held.served is model

    def remove(self, key: Key) -> Version | None:
        """Remove a version, which gets no more requests, and return what was held of it; None: nothing was."""
        held = self.held.pop(key, None)
        if held is not None:
            self._catalog.remove(held.served)
            self._forget(held.served)
            self.report(key[0])
        return held

    def made(self, stored: Bundle) -> ServedModel:
        """Return the entry of a bundle under the server's batching policy, without a state in the metrics."""
        log_cautions(stored.manifest, self._settings)
        manifest = under_policy(stored, self._settings).manifest
        metrics = self._metrics.model(manifest.name, manifest.version)
        for reason in ENGINE_REASONS:  # rules and dashboards read these, which stay 0 here
            self._counted.counter(ENGINE_RESTARTS).labels(manifest.name, manifest.version, reason)
        most = stored.manifest.max_batch_size
        return ServedModel(manifest.name, manifest.version, metrics, manifest, max_request_size=most)

    def broken(self, fault: BundleFault) -> Change:
        """Take note of a version whose manifest is broken."""
        _log.warning("bundle is broken", model=fault.name, version=fault.version, reason=fault.why)
        held = self.held.get((fault.name, fault.version))
        if held is not None and held.running is not None:
            return self._kept(held, fault.why)
        model = ServedModel(fault.name, fault.version, self._metrics.model(fault.name, fault.version))
        self.put(Version(model), ModelState.FAILED, fault.why)
        return self.counted(Change(fault.name, fault.version, Outcome.FAILED, fault.why))

    def failed(self, stored: Bundle, why: str) -> Change:
        """Take note of a bundle that could not be loaded."""
        held = self.held[key_of(stored)]
        if held.running is not None:
            return self._kept(held, why)
        self.put(held, ModelState.FAILED, why)
        return self.counted(Change(*key_of(stored), Outcome.FAILED, why))

    def _kept(self, held: Version, why: str) -> Change:
        """Take note that a version's earlier files serve on, because the new ones cannot."""
        reason = f"{why}; the files loaded before serve on"
        if held.served.state is ModelState.READY:
            held.served.move(ModelState.READY, reason)
            self._shown(held.served)
        return self.counted(Change(held.served.name, held.served.version, Outcome.FAILED, reason))

    def put(self, held: Version, state: ModelState, reason: str = "") -> Running | None:
        """Hold this in the place of the same version, and enter its state.

        Returns:
            What ran the earlier model of this version, which gets no new requests; None: there is none.
        """
        key = held.served.name, held.served.version
        before, self.held[key] = self.held.get(key), held
        held.served.move(state, reason)
        self._catalog.replace(held.served)
        self._shown(held.served)
        self.report(held.served.name)
        if before is None or before.served is held.served:
            return None
        self._forget(before.served)
        return before.running

    def look(self, now: float) -> None:
        """Look for runs that take too long, and report the health of their models."""
        for held in self.held.values():
            why = "" if held.running is None else held.running.why_hung(now)
            if why == held.hangs or held.served.state is not ModelState.READY:
                continue
            held.hangs = held.served.state_reason = why
            if why:
                _log.critical("a run hangs", model=held.served.name, version=held.served.version, reason=why)
            self.report(held.served.name)

    def report(self, name: str = "") -> None:
        """Set the health of one model, and that of the server once it has started."""
        held = [one for one in self.held.values() if one.served.name == name]
        if name and held:
            serves = any(one.served.state is ModelState.READY and not one.hangs for one in held)
            self._health.set(name, serving=serves)
        elif name:
            self._health.forget(name)
        if self._begun:
            self._serves = self._catalog.serves(self._settings.ready, started=self._serves)
            ready = [one for one in self.held.values() if one.served.state is ModelState.READY]
            enough = all if self._settings.ready == "all" else any
            serves = self._serves and enough(not one.hangs for one in ready) and self._reachable()
            for service in (SERVICE, OVERALL):
                self._health.set(service, serving=serves)

    def counted(self, change: Change) -> Change:
        """Count a change, and return it."""
        self._outcomes[change.outcome].inc()
        return change


def key_of(bundle: Bundle) -> Key:
    """Return the name and version of a bundle."""
    return bundle.manifest.name, bundle.manifest.version
