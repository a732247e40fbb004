"""Which request ids and trace contexts are taken, and how they reach log lines."""

from __future__ import annotations

import contextvars
import io
import json

import pytest
from attnserve_server.observability.logs import configure, logger
from attnserve_server.observability.trace_context import CALL, CallContext, context_of, enter

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


def test_all_three_are_taken_and_returned() -> None:
    pairs = [("user-agent", "x"), ("x-request-id", "mine"), ("traceparent", PARENT), ("tracestate", "a=1")]
    found = context_of(pairs)
    assert found == CallContext("mine", PARENT, "a=1")
    assert found.trace_id == TRACE
    assert found.metadata == tuple(pairs[1:])


def test_several_states_are_joined_in_order() -> None:
    found = context_of([("tracestate", "a=1"), ("traceparent", PARENT), ("tracestate", "b=2")])
    assert found is not None
    assert found.tracestate == "a=1,b=2"


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "00",
        PARENT.upper(),
        PARENT + "-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        PARENT + "\n",
    ],
)
def test_a_malformed_parent_is_ignored_with_its_state(parent: str) -> None:
    assert context_of([("traceparent", parent), ("tracestate", "a=1")]) is None
    assert context_of([("x-request-id", "mine"), ("traceparent", parent), ("tracestate", "a=1")]) == CallContext("mine")


def test_a_later_version_may_have_more_fields() -> None:
    later = f"01-{TRACE}-{SPAN}-01-more"
    assert context_of([("traceparent", later)]) == CallContext("", later)


@pytest.mark.parametrize("name", ["", "a\nb", "\u00e9", "a" * 129])
def test_an_id_that_may_not_be_echoed_is_ignored(name: str) -> None:
    assert context_of([("x-request-id", name)]) is None


def test_a_long_state_is_left_out() -> None:
    found = context_of([("traceparent", PARENT), ("tracestate", "a" * 513)])
    assert found == CallContext("", PARENT, "")


def test_binary_metadata_is_ignored() -> None:
    assert context_of([("x-request-id", b"mine"), ("traceparent-bin", b"x")]) is None


def test_lines_of_the_call_carry_both_ids_and_others_none() -> None:
    written = io.StringIO()
    configure(stream=written)

    def call() -> None:
        enter(CallContext("mine", PARENT))
        logger("test").info("inside")

    contextvars.copy_context().run(call)
    logger("test").info("outside")
    inside, outside = map(json.loads, written.getvalue().splitlines())
    assert (inside["request_id"], inside["trace_id"]) == ("mine", TRACE)
    assert not {"request_id", "trace_id"} & set(outside)
    assert CALL.get() is None
