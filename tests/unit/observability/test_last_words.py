"""A process that ends after its log states why, as JSON."""

from __future__ import annotations

import json
import logging

import pytest
from attnserve_server.observability.logs import last_words


def test_words_after_the_log_are_json(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    last_words("the process ends", code=3)
    line = json.loads(capfd.readouterr().err)
    assert (line["event"], line["level"], line["code"]) == ("the process ends", "warning", 3)
    assert line["timestamp"].endswith("Z")
