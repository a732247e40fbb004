"""A link passes on whole messages in order, however they are cut on the way, and reports its end once."""

from __future__ import annotations

import asyncio
import random
import socket

from attnserve_server.isolation.link import Link


async def test_messages_of_any_size_arrive_in_order() -> None:
    one, other = socket.socketpair()
    chance = random.Random(1)
    sent = [chance.randbytes(chance.choice([0, 1, 5, 300, 70_000, 400_000])) for _ in range(200)]
    received: list[bytes] = []
    lost = asyncio.Event()
    sender = await Link.open(one, lambda data: None, lambda: None)
    await Link.open(other, lambda data: received.append(bytes(data)), lost.set)
    for number, message in enumerate(sent):
        sender.send(message)
        if number % 7 == 0:
            await asyncio.sleep(0)
    sender.close()
    async with asyncio.timeout(20):
        await lost.wait()
    assert received == sent


async def test_bytes_are_cut_anywhere() -> None:
    received: list[bytes] = []
    link = Link(lambda data: received.append(bytes(data)), lambda: None)
    stream = b"".join(len(text).to_bytes(4, "little") + text for text in (b"one", b"", b"three"))
    for byte in stream:
        link.data_received(bytes((byte,)))
    assert received == [b"one", b"", b"three"]


async def test_messages_of_one_turn_are_one_write() -> None:
    one, other = socket.socketpair()
    sender = await Link.open(one, lambda data: None, lambda: None)
    for _ in range(50):
        sender.send(b"x" * 10)
    await asyncio.sleep(0.01)
    assert len(other.recv(1 << 16)) == 50 * 14
    sender.close()
    other.close()


async def test_a_message_to_a_lost_link_is_dropped() -> None:
    one, other = socket.socketpair()
    lost = asyncio.Event()
    sender = await Link.open(one, lambda data: None, lost.set)
    other.close()
    async with asyncio.timeout(5):
        await lost.wait()
    sender.send(b"x")
    await asyncio.sleep(0.01)
    sender.close()
