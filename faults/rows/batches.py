"""Rows 6 and 11: answers that must not be given, and requests that fail a run which others share."""

from __future__ import annotations

import asyncio
from typing import Final

from faults import bundles
from faults.history import End
from faults.lab import Lab, Row
from faults.rows.inputs import COMMON

BATCH: Final = 16
PAUSE_S: Final = 0.05
"""Between two batches: these rows are about their answers, and row 14 about load."""


async def _rounds(lab: Lab, model: str, rounds: int, poisoned: int) -> None:
    """Send batches in which some requests hold the poison, and count how each kind ends."""
    computed = lab.server.metric("attnserve_batch_size_sum", model=model)
    runs = lab.server.metric("attnserve_batch_size_count", model=model)
    dropped = lab.server.metric("attnserve_dropped_total", model=model, reason="failed")
    async with lab.caller("healthy") as healthy, lab.caller("poisoned", "INTERNAL") as sick:
        for _ in range(rounds):
            texts = lab.texts(BATCH)
            places = set(lab.random.choice(BATCH, poisoned, replace=False).tolist())
            sent: list[asyncio.Task[End]] = []
            for at, text in enumerate(texts):
                bad = at in places
                caller, text_ = (sick, f"{text} {bundles.POISON}") if bad else (healthy, text)
                sent.append(asyncio.create_task(caller.infer(model, text_)))
            ends = await asyncio.gather(*sent)
            await asyncio.sleep(PAUSE_S)
            lab.injected["poisoned requests"] += poisoned
            lab.injected["batches"] += 1
            for at, end in enumerate(ends):
                expected = "INTERNAL" if at in places else "OK"
                lab.must(end.code == expected, f"a request of batch {int(lab.injected['batches'])}: {end.code}")
    sequences = lab.server.metric("attnserve_batch_size_sum", model=model) - computed
    made = lab.server.metric("attnserve_batch_size_count", model=model) - runs
    failed = lab.server.metric("attnserve_dropped_total", model=model, reason="failed") - dropped
    lab.measured |= {"sequences_per_run": round(sequences / max(1.0, made), 2), "failed": failed}
    lab.control(failed == rounds * poisoned, f"{failed:g} sequences were dropped as failed, of {rounds * poisoned}")
    lab.control(sequences > made, "no run had two sequences, so that none was shared")


async def nan(lab: Lab) -> None:
    """Row 6."""
    await _rounds(lab, bundles.NAN, lab.count(8, 200), 4)


async def poisoned(lab: Lab) -> None:
    """Row 11."""
    await _rounds(lab, bundles.FAILING, lab.count(12, 300), 1)


ROWS: Final = (
    Row(6, "NaN in the model's output", COMMON, nan),
    Row(11, "one request in a batch of 16 makes the run fail", COMMON, poisoned),
)
