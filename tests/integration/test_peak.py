"""The formula of memory holds over MiniLM under a burst of whole maps, and memory returns after it.

Twice the callers that the instances keep busy select every map of texts of the greatest length, on streams that are
read late, and a small queue bounds what waits.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import grpc
import psutil
from attnserve.v1 import attention_pb2
from attnserve.v1 import inference_service_pb2 as pb
from attnserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from serving import RunningServer, serve

MIB = 2**20
FLAGS = {
    "--isolation": "none",
    "--instances": "2",
    "--max-batch-bytes": str(256 * MIB),
    "--max-queue-bytes": str(128 * MIB),
    "--max-unread-bytes": str(128 * MIB),
    "--receive-budget-bytes": str(64 * MIB),
    "--keepalive-s": "15",
}
TEXT = "a contract of sale " * 60


def high_water(server: RunningServer) -> int:
    """The greatest resident memory of the process so far, in bytes."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


async def burst(target: str, callers: int, requests: int) -> int:
    """Request whole maps from several callers. Returns how many were answered."""
    asked = pb.InferRequest(
        model="minilm",
        sequences=[pb.Sequence(text=pb.TextInput(text=TEXT))],
        attention=attention_pb2.AttentionSelection(),
    )
    options = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        stub = InferenceServiceStub(channel)

        async def caller() -> int:
            answered = 0
            for _ in range(requests):
                try:
                    await stub.Infer(asked, timeout=60)
                    answered += 1
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                        raise
                    await asyncio.sleep(0.1)
            return answered

        return sum(await asyncio.gather(*(caller() for _ in range(callers))))


def test_memory_stays_below_the_formula_and_returns_after_a_burst(minilm_repository: Path, tmp_path: Path) -> None:
    flags = [part for pair in FLAGS.items() for part in pair]
    with serve(minilm_repository, tmp_path, *flags) as server:
        lines = [json.loads(line) for line in server.log.read_text().splitlines()]
        peak = next(line for line in lines if line["event"] == "memory")
        process = psutil.Process(server.process.pid)
        assert asyncio.run(burst(server.target, 1, 2)) == 2
        time.sleep(2.5)
        before = process.memory_info().rss
        assert asyncio.run(burst(server.target, 8, 3)) > 4
        most = high_water(server)
        assert most < peak["total_mib"] * MIB
        assert most - before > 100 * MIB, "the control: the burst took memory"
        until = time.monotonic() + 15
        while process.memory_info().rss > before + 64 * MIB and time.monotonic() < until:
            time.sleep(0.5)
        after = process.memory_info().rss
        assert after <= before + 64 * MIB
        # Without its runs and queues, the formula would not hold.
        assert most > (peak["weights_mib"] + peak["received_mib"]) * MIB
