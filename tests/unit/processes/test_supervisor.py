"""The supervisor: what its own process counts, and which systems it runs on. No front and no engine is started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from attnserve_server.config import Settings
from attnserve_server.observability import metrics as module
from attnserve_server.observability.metrics import ACCESS_REFUSED, LOG_LINES_DROPPED, MetricSpec
from attnserve_server.processes.supervisor import Supervisor
from attnserve_server.wanted import StartFailed


def total(supervisor: Supervisor, spec: MetricSpec, *labels: str) -> float:
    return supervisor.metrics.counter(spec).labels(*labels).total


async def test_each_scrape_has_what_the_supervisor_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "dropped_lines", lambda: 3)
    supervisor = Supervisor(Settings(repository=tmp_path, isolation="process"))
    try:
        supervisor.access.refused_without_certificate()
        for _ in range(2):
            await supervisor._collect()
            assert total(supervisor, LOG_LINES_DROPPED) == 3
            assert total(supervisor, ACCESS_REFUSED, "certificate") == 1
    finally:
        await supervisor.aclose()


def test_a_system_without_shared_memory_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(StartFailed, match="set --isolation none"):
        Supervisor(Settings(repository=tmp_path, isolation="process"))
