"""Joining the pieces of a tokenizer file, and the load of models, without a server."""

from __future__ import annotations

import hashlib

import pytest
from attnserve.v1 import inference_service_pb2 as wire
from attnserve_client import Client
from attnserve_client._gateways import MOST_STARTS, Pieces
from attnserve_client.errors import BadAnswer
from attnserve_client.testing import FakeServer


def piece(content: bytes, offset: int, size: int = 4) -> wire.GetTokenizerResponse:
    return wire.GetTokenizerResponse(
        digest=f"sha256:{hashlib.sha256(content).hexdigest()}",
        total_bytes=len(content),
        offset=offset,
        data=content[offset : offset + size],
    )


def test_pieces_join_to_the_file() -> None:
    pieces = Pieces()
    assert pieces.add(piece(b"abcdefghij", 0)) is None
    assert pieces.add(piece(b"abcdefghij", 4)) is None
    file = pieces.add(piece(b"abcdefghij", 8))
    assert file is not None
    assert (file.content, file.pair_start_id) == (b"abcdefghij", None)


def test_an_empty_file_is_complete_at_once() -> None:
    file = Pieces().add(piece(b"", 0))
    assert file is not None
    assert file.content == b""


def test_a_model_that_is_replaced_is_read_again_from_the_start() -> None:
    pieces = Pieces()
    pieces.add(piece(b"abcdef", 0))
    assert pieces.add(piece(b"wxy", 4)) is None
    assert pieces.offset == 0
    file = pieces.add(piece(b"wxy", 0))
    assert file is not None
    assert file.content == b"wxy"


def test_a_model_that_is_replaced_all_the_time_is_an_error() -> None:
    pieces = Pieces()
    contents = [bytes([number]) * 6 for number in range(MOST_STARTS + 1)]
    for content in contents[:-1]:
        assert pieces.add(piece(content, 0)) is None
    with pytest.raises(BadAnswer, match="was replaced while"):
        pieces.add(piece(contents[-1], 0))


@pytest.mark.parametrize("offset", [3, 8])
def test_a_piece_from_another_place_is_an_error(offset: int) -> None:
    pieces = Pieces()
    pieces.add(piece(b"abcdefghij", 0))
    with pytest.raises(BadAnswer, match="was not expected at 4"):
        pieces.add(piece(b"abcdefghij", offset))


def test_a_file_without_its_digest_is_an_error() -> None:
    wrong = piece(b"abc", 0)
    wrong.data = b"xyz"
    with pytest.raises(BadAnswer, match="does not have its digest"):
        Pieces().add(wrong)


def test_an_unknown_wait_is_none() -> None:
    with FakeServer() as server, Client(server.target) as client:
        (known,) = client.loads()
        server.load.ClearField("predicted_wait_seconds")
        (unknown,) = client.loads("fake")
    assert (known.state, known.instances, known.predicted_wait_s) == ("ready", 1, 0.0)
    assert unknown.predicted_wait_s is None
