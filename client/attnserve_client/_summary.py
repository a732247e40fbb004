"""Results in few words: their one-line form, and the list of their maps, which states why one is missing."""

from __future__ import annotations

from typing import Any

from attnserve_client._attention import AttentionMap


class Maps(list[AttentionMap]):
    """The maps of a result, whose IndexError states why there is no such map."""

    def __getitem__(self, index: Any) -> Any:
        """Return a map, or several.

        Raises:
            IndexError: There is no such map.
        """
        try:
            return super().__getitem__(index)
        except IndexError:
            if self:
                raise IndexError(f"attention[{index}] of {len(self)} maps; `sites` of each names its place") from None
            raise IndexError(
                "the result has no attention map, as the request selected none; "
                "pass attention=AttentionSelection(layers=[-1]), or attention=True for all of it"
            ) from None


def summary_of(result: Any) -> str:
    """Describe a result on one line, with shapes in place of values."""
    receipt = result.receipt
    parts = [f"{receipt.model} {receipt.version}".strip() or "no model"]
    parts += [f"{name} {array.dtype} {array.shape}" for name, array in result.outputs.items()]
    if result.attention:
        first = result.attention[0]
        parts.append(f"{len(result.attention)} attention maps, the first {first.shape_text}")
    if result.features is not None:
        parts.append(f"features {', '.join(result.features.names)} of {len(result.features.sites)} sites")
    if result.labels is not None:
        parts.append(repr(result.labels))
    if receipt.digest:
        parts.append(receipt.digest[: len("sha256:") + 12])
    return f"InferenceResult({'; '.join(parts)})"
