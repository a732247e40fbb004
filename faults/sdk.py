"""Calls through the SDK, recorded as those of `wire` are: one record for each call, all its attempts together."""

from __future__ import annotations

from typing import Any

from attnserve_client import AsyncClient, AttentionSelection, AttnserveError

from faults.bundles import MAP
from faults.history import End, Recorder


async def infer(client: AsyncClient, recorder: Recorder, model: str, key: str, timeout_s: float) -> End:
    """Run the input of a key, and return how the call ended."""
    selected = AttentionSelection(layers=[-1], heads="mean") if key.startswith(MAP) else None
    call = recorder.begin(model, "", (key,), timeout_s)
    try:
        result = await client.infer(
            model, key.removeprefix(MAP), attention=selected, outputs=["embedding"], timeout=timeout_s
        )
    except AttnserveError as error:
        return recorder.end(call, error.code, reason=error.reason, message=error.message)
    answer: dict[str, Any] = {"embedding": result.outputs["embedding"]}
    for one in result.attention:
        answer[f"attention_mean.{one.sites[0]}"] = one.weights[0]
    return recorder.end(call, "OK", version=result.receipt.version, answers=(answer,))
