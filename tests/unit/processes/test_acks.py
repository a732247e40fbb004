"""Answers of fronts: each resolves one expectation, and a front that ends resolves all that are left of it."""

from __future__ import annotations

from attnserve_server.processes.acks import Acks


async def test_an_answer_resolves_what_was_expected_of_its_front() -> None:
    acks = Acks()
    one, other, later = acks.expect(1, "synced 1"), acks.expect(2, "synced 1"), acks.expect(1, "synced 2")
    acks.resolve(1, "synced 1")
    assert [future.done() for future in (one, other, later)] == [True, False, False]
    acks.resolve(1, "synced 1")
    acks.resolve(3, "synced 1")
    assert not other.done()


async def test_a_front_that_ends_has_nothing_left_to_answer() -> None:
    acks = Acks()
    one, other, later = acks.expect(1, "synced 1"), acks.expect(2, "synced 1"), acks.expect(1, "retired 4")
    acks.forget(1)
    assert [future.done() for future in (one, other, later)] == [True, False, True]


async def test_nothing_is_expected_once_the_server_ends() -> None:
    acks = Acks()
    before = acks.expect(1, "synced 1")
    before.cancel()
    acks.close()
    assert acks.expect(1, "synced 2").done()
