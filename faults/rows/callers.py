"""Rows 12, 13, 15 and 16: callers that leave, hurry, retry, or all come at once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from datetime import datetime
from typing import Any, Final

from attnserve_client import AsyncClient, RetryPolicy
from scraping import free_port

from faults import bundles, sdk
from faults.history import Recorder
from faults.lab import WITHIN_DEADLINE, Lab, Row, Setup
from faults.wire import Wire

QUEUED: Final = Setup(
    models=(bundles.CANARY, bundles.TINY, bundles.HEAVY), flags=("--instances", "1", "--wide-threads", "1")
)
"""Of rows that need a queue: one run at a time of a model whose runs take some ten milliseconds on one core."""
REFUSING: Final = Setup(failpoints=("unavailable",), isolation="none")
HERD: Final = Setup(models=(bundles.CANARY, bundles.TINY, bundles.HEAVY), starts=False)
PAUSE_S: Final = 0.05
"""Mean pause of each caller of row 15 between two calls: together, they make at most 320 a second."""
HERD_S: Final = 2.0
"""Longest pause of a thousand callers that wait for a server to start: it is refusing one of them each millisecond."""
LATE_S: Final = 0.025
"""A wait beyond every deadline of row 13, and a bound of a bucket of the server's histogram."""
COLD: Final = frozenset({"OK", "UNAVAILABLE", "RESOURCE_EXHAUSTED:OVERLOADED"})


def _dropped(lab: Lab, model: str) -> dict[str, float]:
    reasons = ("expired", "cancelled", "terminated", "failed")
    return {one: lab.server.metric("attnserve_dropped_total", model=model, reason=one) for one in reasons}


async def leaving(lab: Lab) -> None:
    """Row 12."""
    model, before = bundles.HEAVY, _dropped(lab, bundles.HEAVY)
    computed = lab.server.metric("attnserve_sequences_total", model=model)
    count, rounds = 48, lab.count(4, 100)
    async with lab.caller("staying") as staying, lab.caller("leaving", "OK", "CANCELLED") as fickle:
        for _ in range(rounds):
            sent = []
            for at, text in enumerate(lab.texts(count)):
                # At the start, in the queue early and late, in a run, and at about its end.
                after = [0.0, 0.005, 0.03, 0.08, 0.2][at % 5] * float(lab.random.uniform(0.7, 1.3))
                sent.append(fickle.infer(model, text, leave_after_s=after) if at % 2 else staying.infer(model, text))
            await asyncio.gather(*sent)
            lab.injected["calls with a point of leaving"] += count // 2
        for text in lab.texts(5):  # alone in its run, which ends with it
            await fickle.infer(model, text, leave_after_s=0.01)
            lab.injected["runs without a caller"] += 1
    idle = await lab.until(lambda: lab.server.metric("attnserve_running_batches", model=model) == 0)
    lab.must(idle, "runs continue after all callers have ended")
    lab.must(lab.server.metric("attnserve_queue_depth", model=model) == 0, "the queue keeps what was cancelled")
    dropped = {reason: value - before[reason] for reason, value in _dropped(lab, model).items()}
    ran = lab.server.metric("attnserve_sequences_total", model=model) - computed
    lab.measured |= {"dropped": dropped, "computed": ran}
    lab.control(dropped["cancelled"] > 0, "no call was cancelled in the queue")
    lab.control(dropped["terminated"] > 0, "no run was ended by the last of its callers")
    most = rounds * count + 5 - dropped["cancelled"] - dropped["terminated"]
    lab.must(ran <= most, f"{ran:g} sequences were computed, although all but {most:g} had left before")


async def hurried(lab: Lab) -> None:
    """Row 13."""
    model, before = bundles.HEAVY, _dropped(lab, bundles.HEAVY)
    late = _started_late(lab, model)
    count, rounds = 64, lab.count(6, 150)
    codes = ("OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED:OVERLOADED")
    async with lab.caller("hurried", *codes) as wire, lab.caller("patient") as patient:
        for _ in range(rounds):
            calls = [
                wire.infer(model, text, timeout_s=float(lab.random.uniform(0.001, 0.02))) for text in lab.texts(count)
            ]
            calls += [patient.infer(model, text) for text in lab.texts(2)]
            await asyncio.gather(*calls)
            lab.injected["deadlines of 1 to 20 ms"] += count
    dropped = {reason: value - before[reason] for reason, value in _dropped(lab, model).items()}
    answered = sum(seconds > LATE_S for seconds in patient.queues_s)  # the server's buckets include their bound
    executed = _started_late(lab, model) - late - answered
    lab.measured |= {"dropped": dropped, "executed_after_expiry": executed}
    lab.must(executed <= 0, f"{executed:g} sequences were run after their deadline")
    missed = lab.checker.codes["hurried"]
    lab.control(missed["DEADLINE_EXCEEDED"] + missed["RESOURCE_EXHAUSTED"] > 0, "no deadline passed")


def _started_late(lab: Lab, model: str) -> float:
    """The sequences whose run began more than `LATE_S` after they came. Only the patient ones may wait so long."""
    samples = lab.server.samples()
    of_model = [(name, labels, value) for name, labels, value in samples if labels.get("model") == model]
    all_ = sum(value for name, _, value in of_model if name == "attnserve_queue_seconds_count")
    soon = sum(
        value for name, labels, value in of_model
        if name == "attnserve_queue_seconds_bucket" and float(labels["le"]) == LATE_S
    )  # fmt: skip
    return all_ - soon


async def storm(lab: Lab) -> None:
    """Row 15."""
    lab.allowed["retrying"] = lab.allowed["control"] = frozenset({"UNAVAILABLE:NOT_SERVING"})
    calls = lab.count(640, 6_400)

    async def attempts(name: str, total: int, **policy: Any) -> float:
        before = lab.server.metric("grpc_server_handled_total", grpc_method="Infer", grpc_code="UNAVAILABLE")
        recorder, left = Recorder(name, lab.sink), iter(lab.texts(total))
        async with AsyncClient(lab.server.target, retry=RetryPolicy(**policy)) as client:

            async def caller() -> None:
                for text in left:
                    await sdk.infer(client, recorder, bundles.TINY, text, 20.0)
                    await asyncio.sleep(float(lab.random.exponential(PAUSE_S)))

            # The row counts attempts, and row 14 has the load.
            await asyncio.gather(*(caller() for _ in range(16)))
        after = lab.server.metric("grpc_server_handled_total", grpc_method="Infer", grpc_code="UNAVAILABLE")
        lab.injected["refused attempts"] += int(after - before)
        return (after - before) / total

    found = await attempts("retrying", calls)
    freely = await attempts("control", 64, budget_tokens=1e9, initial_backoff_s=0.01)
    lab.measured |= {"attempts_per_call": round(found, 3), "without_budget": round(freely, 3)}
    lab.must(found <= 1.1, f"{found:.3f} attempts a call, above 1.1")
    lab.control(freely > 3.5, f"without its budget, the SDK makes {freely:.2f} attempts a call")


async def herd(lab: Lab) -> None:
    """Row 16."""
    count, port = lab.count(200, 1_000), free_port()
    answered: list[float] = []
    codes: Counter[str] = Counter()
    lab.allowed |= dict.fromkeys(("herd", "last"), COLD)

    async def one(wire: Wire, text: str) -> None:
        while True:
            end = await wire.infer(bundles.TINY, text, timeout_s=20.0)
            codes[end.code] += 1
            if end.code == "OK":
                answered.append(end.at_s)
                return
            await asyncio.sleep(float(lab.random.uniform(0.0, HERD_S * count / 1_000)))

    wires = [Wire(lab.sink, f"herd {number}", f"127.0.0.1:{port}") for number in range(count)]
    lab.allowed |= {f"herd {number}": COLD for number in range(count)}
    waiting = [asyncio.create_task(one(wire, text)) for wire, text in zip(wires, lab.texts(count), strict=True)]
    await asyncio.sleep(0.5)
    # A lower version may answer until the highest is ready.
    lab.bench.service.pause(bundles.TINY, time.monotonic())
    server = await lab.bench.start("--grpc-port", str(port))
    lab.bench.service.resume(bundles.TINY, time.monotonic())
    lab.injected["channels"] = count
    try:
        async with asyncio.timeout(120):
            await asyncio.gather(*waiting)
        offset = time.monotonic() - time.time()  # noqa: TID251 - the log has the wall clock
        stamps = [one["timestamp"] for one in server.events() if one["event"] == "model ready"]
        first = min(datetime.fromisoformat(one).timestamp() for one in stamps) + offset
        lab.measured |= {
            "refused_before_ready": codes["UNAVAILABLE"], "first_answer_after_ready_s": round(min(answered) - first, 3),
        }  # fmt: skip
        lab.must(
            min(answered) >= first - 0.01, f"an answer came {first - min(answered):.3f} s before the model was ready"
        )
        lab.control(codes["UNAVAILABLE"] >= count, "the callers came before the server")
        await lab.watch()
        for _ in range(3):
            await asyncio.gather(*(wire.infer(bundles.TINY, "the cat", timeout_s=20.0) for wire in wires))
    finally:
        for each in waiting:
            each.cancel()
        await asyncio.gather(*(wire.channel.close() for wire in wires))


ROWS: Final = (
    Row(12, "callers cancel in the queue and during runs", QUEUED, leaving),
    Row(13, "a storm of deadlines of 1 to 20 ms", QUEUED, hurried),
    Row(15, "a storm of retries", REFUSING, storm),
    Row(16, "a herd of callers before the server starts", HERD, herd, WITHIN_DEADLINE),
)
