"""A scheduler that adds spans to the traces of its requests: queue, batch, run and attention. With `--tracing` only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.values import PreparedSequence, SequenceResult
from attnserve_server.engine.executor import Outcome
from attnserve_server.engine.session import RunHandle
from attnserve_server.scheduling.queue import Entry, Request, State
from attnserve_server.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext

    from attnserve_server.observability.tracing import Trace, Tracing


class TracedScheduler(Scheduler):
    """A scheduler whose runs and waits become spans. Event loop only.

    The sequences of one request in one batch have one span of each kind.
    """

    def __init__(self, *arguments: Any, tracing: Tracing, **options: Any) -> None:
        """As `Scheduler`. `tracing`: takes the spans."""
        super().__init__(*arguments, **options)
        self._tracing = tracing
        self._named: Mapping[str, str] = {
            "attnserve.model.name": self._manifest.name,
            "attnserve.model.version": self._manifest.version,
        }

    async def _execute(
        self,
        entries: list[Entry],
        sequences: list[PreparedSequence],
        handle: RunHandle,
        instance: int,
        *,
        alone: bool,
    ) -> list[Outcome]:
        began_s = self._clock.now()
        outcomes = await super()._execute(entries, sequences, handle, instance, alone=alone)
        self._trace(entries, outcomes, began_s, self._clock.now())
        return outcomes

    def _withdraw(self, request: Request, reason: str) -> None:
        trace = request.trace
        if trace is not None and any(entry.state is State.ADMITTED for entry in request.entries):
            self._tracing.add(trace, "queue", request.arrived_s, self._clock.now(), self._named, error=reason)
        super()._withdraw(request, reason)

    def _trace(self, entries: list[Entry], outcomes: list[Outcome], began_s: float, ended_s: float) -> None:
        members: dict[int, tuple[Trace, Request, list[Outcome]]] = {}
        for entry, outcome in zip(entries, outcomes, strict=True):
            request = entry.request
            if request.trace is not None:
                members.setdefault(id(request), (request.trace, request, []))[2].append(outcome)
        if not members:
            return
        facts = {**self._named, "attnserve.batch.size": len(entries), **_facts_of(outcomes)}
        traces = [trace for trace, _, _ in members.values()]
        batch = self._tracing.add_batch(traces, began_s, ended_s, facts, _error_of(outcomes))
        for trace, request, own in members.values():
            waited: dict[str, str | int] = {**self._named, "attnserve.sequences": len(own)}
            self._tracing.add(trace, "queue", request.arrived_s, began_s, waited)
            self._metrics.queue_seconds.exemplify(began_s - request.arrived_s, trace.trace_id)
            self._trace_run(trace, own, batch, began_s, ended_s)

    def _trace_run(self, trace: Trace, own: list[Outcome], batch: SpanContext, began_s: float, ended_s: float) -> None:
        """Add the spans of the run, or the runs of a batch that was split, and of the attention of one request."""
        tracing, metrics = self._tracing, self._metrics
        results = [one for one in own if isinstance(one, SequenceResult)]
        error = _error_of(own)
        if error:
            tracing.add(trace, "run", began_s, ended_s, self._named, batch, error)
        for run in dict.fromkeys(one.run for one in results):
            tracing.add(trace, "run", run.began_s, run.began_s + run.compute_s, _facts_of(results), batch)
            metrics.compute_seconds.exemplify(run.compute_s, trace.trace_id)
        reduced = [one for one in results if one.attention_s]
        if reduced:
            begin = min(one.attention_began_s for one in reduced)
            end = max(one.attention_began_s + one.attention_s for one in reduced)
            facts: dict[str, str | int] = {**self._named, "attnserve.sequences": len(reduced)}
            tracing.add(trace, "attention", begin, end, facts, batch)
            metrics.attention_seconds.exemplify(max(one.attention_s for one in reduced), trace.trace_id)


def _facts_of(outcomes: list[Outcome] | list[SequenceResult]) -> dict[str, Any]:
    """Return the attributes of the run of the first sequence that has a result."""
    run = next((one.run for one in outcomes if isinstance(one, SequenceResult)), None)
    if run is None:
        return {}
    return {
        "attnserve.run.sequences": run.batch_size,
        "attnserve.run.useful_tokens": run.useful_tokens,
        "attnserve.run.computed_tokens": run.computed_tokens,
        "attnserve.run.instance": run.instance,
        "attnserve.run.wide": run.wide,
    }


def _error_of(outcomes: list[Outcome]) -> str:
    """Return the reason of the first failure; empty if there is none."""
    return next((one.reason for one in outcomes if isinstance(one, AttnserveError)), "")
