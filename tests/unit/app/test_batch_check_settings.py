"""The settings of the shadow check follow from those of the server.

The shadow check repeats a share of the batched sequences alone, and compares the answers with those that were served.
Without a share, `batch_check_settings` returns None.
"""

from __future__ import annotations

from attnserve_server.config import Settings
from attnserve_server.loading import batch_check_settings
from attnserve_server.scheduling.verifier import ShadowSettings


def test_shadow_check_is_off_without_a_share() -> None:
    assert batch_check_settings(Settings()) is None
    assert batch_check_settings(Settings(verify_action="isolate")) is None
    assert batch_check_settings(Settings(verify_batches=0.001)) == ShadowSettings(share=0.001, action="count")
    assert batch_check_settings(Settings(verify_batches=1, verify_action="isolate")) == ShadowSettings(1.0, "isolate")
