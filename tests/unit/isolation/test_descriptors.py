"""Packages of descriptors arrive with their numbers, also if the receiver reads late or waits first; none is left."""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path

from attnserve_server.isolation.descriptors import DescriptorReceiver, DescriptorSender, descriptor_pair

TIMEOUT_S = 10


def open_count() -> int:
    gc.collect()  # memory that earlier tests have mapped has descriptors too
    return len(list(Path("/proc/self/fd").iterdir()))


def content(descriptor: int) -> bytes:
    try:
        return os.pread(descriptor, 10, 0)
    finally:
        os.close(descriptor)


async def test_packages_arrive_by_number_in_any_order(tmp_path: Path) -> None:
    one, other = descriptor_pair()
    sender, receiver = DescriptorSender(one), DescriptorReceiver(other)
    files = [(tmp_path / str(number)).open("w+b", buffering=0) for number in range(3)]
    for number, file in enumerate(files):
        file.write(bytes([number]))
    late = asyncio.create_task(receiver.take(2))
    await asyncio.sleep(0)
    numbers = sender.send(files[0].fileno()), sender.send(files[1].fileno(), files[2].fileno())
    assert numbers == (1, 2)
    for file in files:
        file.close()
    async with asyncio.timeout(TIMEOUT_S):
        assert [content(descriptor) for descriptor in await late] == [b"\x01", b"\x02"]
        assert [content(descriptor) for descriptor in await receiver.take(1)] == [b"\x00"]
    sender.close()
    receiver.close()


async def test_more_packages_than_the_socket_holds_wait_for_the_receiver() -> None:
    before = open_count()
    one, other = descriptor_pair()
    sender = DescriptorSender(one)
    memory = os.memfd_create("test")
    for _ in range(400):
        sender.send(memory)
    assert open_count() > before + 10, "the socket is full, and the rest waits"
    receiver = DescriptorReceiver(other)
    async with asyncio.timeout(TIMEOUT_S):
        for number in range(1, 401):
            for descriptor in await receiver.take(number):
                os.close(descriptor)
    os.close(memory)
    sender.close()
    await asyncio.sleep(0.01)
    assert open_count() <= before, "fewer, if garbage of an earlier test was collected meanwhile"


async def test_packages_for_a_receiver_that_has_ended_are_dropped() -> None:
    before = open_count()
    one, other = descriptor_pair()
    sender = DescriptorSender(one)
    other.close()
    sender.send(0)
    sender.send(0)
    sender.close()
    assert open_count() == before
