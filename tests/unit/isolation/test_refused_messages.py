"""An engine decodes what a front sends, or refuses it: no array outside of the arena, and none of another dtype.

Refused messages raise msgspec.DecodeError or ValueError.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec
import numpy as np
import pytest
from attnserve_server.domain.values import PreparedSequence
from attnserve_server.isolation.arena import SLOT_BYTES, Arena
from attnserve_server.isolation.messages import TO_ENGINE, Inbox, Outbox

SIZE = 8 * SLOT_BYTES


def arena() -> Arena:
    descriptor = Arena.create_descriptor(SIZE)
    try:
        return Arena(descriptor, SIZE)
    finally:
        os.close(descriptor)


def asked(shared: Arena, array: np.ndarray) -> bytes:
    sequence = PreparedSequence({"x": array}, {"seq": 3}, ("y",))
    return Outbox(shared).ask(7, "r", None, 9, 1, [sequence])


def with_array(message: bytes, at: int, value: Any) -> bytes:
    """The message with another dtype (1), shape (2) or place (3) of its only array."""
    decoded = msgspec.msgpack.decode(message)
    decoded[6][0][0][0][at] = value
    return msgspec.msgpack.encode(decoded)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (1, "O"),
        (1, "ui8"),
        (1, "(9,9)f8"),
        (1, "V0"),
        (2, [-1]),
        (2, [2**62, 2**62]),
        (2, [2]),
        (3, b""),
        (3, b"123"),
        (3, [0, SIZE + 1]),
        (3, [-8, 24]),
        (3, [SIZE - 8, 24]),
        (3, [2**63, 24]),
    ],
)
async def test_an_array_that_is_none_is_refused(at: int, value: Any) -> None:
    shared = arena()
    good = asked(shared, np.arange(3))
    with pytest.raises((msgspec.DecodeError, ValueError)):
        Inbox(shared, lambda _: None).sequences(TO_ENGINE.decode(with_array(good, at, value)))
    assert Inbox(shared, lambda _: None).sequences(TO_ENGINE.decode(with_array(good, 2, [3])))
