"""Logs: each event is one JSON line, for every source and every text.

The fixture `written` collects the lines of level info and above. Nothing raises.
"""

from __future__ import annotations

import io
import json
import logging

import pytest
from attnserve_server.observability.logs import _log_native, configure, logger


@pytest.fixture
def written() -> io.StringIO:
    stream = io.StringIO()
    configure("info", stream)
    return stream


def lines(written: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_event_is_one_line_with_level_and_time(written: io.StringIO) -> None:
    logger("test").info("done", request_id="a")
    (line,) = lines(written)
    assert (line["event"], line["level"], line["request_id"]) == ("done", "info", "a")
    assert str(line["timestamp"]).endswith("Z")


def test_text_of_a_caller_cannot_forge_or_colour_a_line(written: io.StringIO) -> None:
    evil = 'a\r\n{"event": "forged"}\x1b[31m\u2028"'
    logger("test").info("refused", request_id=evil)
    assert written.getvalue().count("\n") == 1
    assert "\x1b" not in written.getvalue()
    assert "\u2028" not in written.getvalue()
    assert lines(written)[0]["request_id"] == evil


def test_line_of_a_library_is_json_with_its_extra_fields(written: io.StringIO) -> None:
    logging.getLogger("attnserve_server.engine.executor").error("failed %s", "here", extra={"model": "tiny"})
    (line,) = lines(written)
    assert (line["event"], line["model"], line["logger"]) == ("failed here", "tiny", "attnserve_server.engine.executor")


def test_traceback_is_part_of_its_line(written: io.StringIO) -> None:
    with pytest.raises(ValueError, match="why") as caught:
        int("why")
    logger("test").error("failed", exc_info=caught.value)
    (line,) = lines(written)
    assert "ValueError: invalid literal" in str(line["exception"])


def test_events_below_the_level_are_not_written(written: io.StringIO) -> None:
    logger("test").debug("no")
    logging.getLogger("test").debug("no")
    logging.getLogger("uvicorn.error").info("no")
    assert written.getvalue() == ""


NATIVE = {
    "gRPC's core": (
        "E0000 00:00:1796000000.123456  171 chttp2_server.cc:1123] No address added",
        {"level": "error", "source": "chttp2_server.cc:1123", "event": "No address added"},
    ),
    "gRPC's core at info": (
        "I0000 00:00:1796000000.123456      17 subchannel.cc:7] connected [::1]:1] x",
        {"level": "info", "source": "subchannel.cc:7", "event": "connected [::1]:1] x"},
    ),
    "onnxruntime, in colour": (
        "\x1b[0;93m2026-11-30 00:46:11.123456789 [W:onnxruntime:, session_state.cc:1280 Verify] Some nodes\x1b[m",
        {"level": "warning", "source": "session_state.cc:1280", "event": "Some nodes"},
    ),
    "unknown": ("free(): invalid pointer", {"level": "error", "event": "free(): invalid pointer"}),
    "forged": ('{"event": "forged"}\x1b[31m %s', {"level": "error", "event": '{"event": "forged"}\x1b[31m %s'}),
}


@pytest.mark.parametrize("text", NATIVE)
def test_line_of_native_code_is_json_with_what_it_states(written: io.StringIO, text: str) -> None:
    line, expected = NATIVE[text]
    _log_native(line.encode())
    (found,) = lines(written)
    assert found.pop("logger") == "stderr"
    assert found.pop("timestamp")
    assert found == expected
    assert "\x1b" not in written.getvalue()


def test_line_of_native_code_names_its_process_and_survives_broken_text(written: io.StringIO) -> None:
    _log_native(b"\xff broken\r", "front 0")
    (found,) = lines(written)
    assert (found["event"], found["process"]) == ("\\xff broken", "front 0")
