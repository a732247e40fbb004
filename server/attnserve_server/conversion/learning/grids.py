"""Which fixed axes run over the patches of an image, and how many rows and columns of them there are."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.conversion.learning.origins import FixedAxes
from attnserve_server.model.manifest import InputSpec

MOST_LEADING = 8
"""Positions before the patches: a class token, one of distillation, registers."""
_CHANNELS = {1, 3, 4}

Grid = tuple[tuple[int, int], int]
"""Rows and columns, and how many positions stand before them."""


def grids_of(signature: Signature, fixed: FixedAxes) -> dict[str, Grid]:
    """The patch grid of every fixed axis that runs over the patches of an image.

    An image is an input of fixed height and width with 1, 3 or 4 channels. Its patches are told by the convolution that
    cuts them, or else by the one size of square patches that fits the axis.
    """
    images = {spec.name: size for spec in signature.inputs if (size := _size(spec)) is not None}
    grids: dict[str, Grid] = {}
    for symbol, length in fixed.lengths.items():
        origin = fixed.origins[symbol]
        for name in sorted(origin.inputs & set(images)):
            cut = [shape for value in origin.values if (shape := _cut(value)) is not None]
            found = [
                (grid, length - grid[0] * grid[1])
                for grid in (cut or list(_square_patches(*images[name])))
                if 0 <= length - grid[0] * grid[1] <= MOST_LEADING
            ]
            if found:
                grids[symbol] = min(found, key=lambda grid: grid[1])
    return grids


def _size(spec: InputSpec) -> tuple[int, int] | None:
    """Height and width of an image, channels first or last."""
    match spec.shape:
        case (int(channels), int(height), int(width)) if channels in _CHANNELS and min(height, width) > 4:
            return height, width
        case (int(height), int(width), int(channels)) if channels in _CHANNELS and min(height, width) > 4:
            return height, width
    return None


def _cut(value: ir.Value) -> tuple[int, int] | None:
    """Rows and columns of what a convolution whose strides are its kernel makes of an image."""
    node = value.producer()
    if node is None or node.op_type != "Conv" or value.shape is None or len(value.shape) != 4:
        return None
    strides = list(node.attributes.get_ints("strides", []))
    kernel = list(node.attributes.get_ints("kernel_shape", []))
    rows, columns = value.shape[2], value.shape[3]
    if strides != kernel or not isinstance(rows, int) or not isinstance(columns, int):
        return None
    return rows, columns


def _square_patches(height: int, width: int) -> Iterator[tuple[int, int]]:
    for side in range(2, min(height, width) + 1):
        if height % side == 0 and width % side == 0:
            yield height // side, width // side
