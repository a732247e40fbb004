"""Values that hold sizes, and arrays of these: what shapes are computed from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from attnserve_server.build.proof.intervals import Interval
from attnserve_server.build.proof.layout import plain, size_of
from attnserve_server.build.proof.sizes import Size
from attnserve_server.build.proof.values import Value

SizesArray = npt.NDArray[np.object_]


def sizes_value(like: Value, sizes: Sequence[Size | None]) -> Value:
    """Whole numbers made of sizes, on the axes of another value."""
    bounds = [size.bounds() for size in sizes if size is not None]
    span = Interval()
    if len(bounds) == len(sizes) and bounds:
        span = Interval(min(low for low, _ in bounds), max(high for _, high in bounds))
    return Value(like.layout, span=span, lit=span, sizes=tuple(sizes))


def sizes_array(value: Value) -> SizesArray | None:
    """The sizes that a value holds, in its shape; None where it holds none, or its shape is not known."""
    if value.sizes is None or value.layout is None:
        return None
    shape = [size_of(axis).number for axis in value.layout]
    if any(extent is None for extent in shape) or math.prod(extent or 0 for extent in shape) != len(value.sizes):
        return None
    array = np.empty(len(value.sizes), dtype=object)
    array[:] = value.sizes
    return array.reshape([extent or 0 for extent in shape])


def of_sizes_array(array: SizesArray) -> Value:
    """The value that holds these sizes."""
    return of_sizes(list(array.reshape(-1)), array.shape)


def of_sizes(sizes: Sequence[Size | None], shape: Sequence[int]) -> Value:
    """The value that holds these sizes, in row-major order."""
    return sizes_value(Value(tuple(plain(Size.of(extent)) for extent in shape)), sizes)
