"""Move the weights that two graphs share into one data file, which holds them once: `share_weights`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import onnx
from onnx.external_data_helper import set_external_data

WEIGHTS_FILE: Final = "weights.data"
"""Name of the data file, beside both graphs."""
LEAST_BYTES: Final = 2**20
"""Least size of shared weights that is worth a file."""
_LEAST_TENSOR: Final = 2**12
"""Smaller tensors, such as shapes and scales, stay in the graphs: the runtime needs their values to optimize."""
_ALIGNMENT: Final = 2**12
"""Each tensor starts on a page, so that the runtime can map it into memory instead of reading it."""


def share_weights(first: Path, second: Path, *, least_bytes: int = LEAST_BYTES) -> Path | None:
    """Rewrite two graphs so that equal weights are in one file beside them.

    Args:
        first: a graph with its weights inside; it is replaced.
        second: another one, which a bundle has beside the first; it is replaced.
        least_bytes: the least size of all shared weights; if they are smaller, nothing is changed.

    Returns:
        The data file, beside the first graph; None if nothing was changed.

    Raises:
        OSError: a file cannot be read or written.
    """
    protos = [onnx.load(path) for path in (first, second)]
    by_digest = [{_digest(tensor): tensor for tensor in _large(proto)} for proto in protos]
    shared = [digest for digest in by_digest[0] if digest in by_digest[1]]
    if sum(len(by_digest[0][digest].raw_data) for digest in shared) < least_bytes:
        return None
    data = first.with_name(WEIGHTS_FILE)
    places: dict[bytes, tuple[int, int]] = {}
    with data.open("wb") as file:
        for digest in shared:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            places[digest] = (file.tell(), len(by_digest[0][digest].raw_data))
            file.write(by_digest[0][digest].raw_data)
    for path, proto in zip((first, second), protos, strict=True):
        for tensor in _large(proto):
            place = places.get(_digest(tensor))
            if place is not None:
                set_external_data(tensor, WEIGHTS_FILE, *place)
                tensor.ClearField("raw_data")
        path.write_bytes(proto.SerializeToString())
    return data


def _large(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    return (tensor for tensor in proto.graph.initializer if len(tensor.raw_data) >= _LEAST_TENSOR)


def _digest(tensor: onnx.TensorProto) -> bytes:
    """Return a digest of a tensor's numbers. Two of equal bytes may differ in shape: only the bytes are shared."""
    return hashlib.sha256(tensor.raw_data).digest()
