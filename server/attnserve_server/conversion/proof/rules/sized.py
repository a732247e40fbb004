"""Values that hold sizes, as NumPy arrays of `Size`. The rules of the proof compute shapes from these.

`sizes_array` returns None for any other value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from attnserve_server.conversion.proof.helpers import sizes_value
from attnserve_server.conversion.proof.layout import plain, size_of
from attnserve_server.conversion.proof.sizes import Size
from attnserve_server.conversion.proof.values import Value

SizesArray = npt.NDArray[np.object_]


def sizes_array(value: Value) -> SizesArray | None:
    """Return the sizes that a value holds, in its shape. None where it holds none, or its shape is not known."""
    if value.sizes is None or value.layout is None:
        return None
    shape = [size_of(axis).number for axis in value.layout]
    if any(extent is None for extent in shape) or math.prod(extent or 0 for extent in shape) != len(value.sizes):
        return None
    array = np.empty(len(value.sizes), dtype=object)
    array[:] = value.sizes
    return array.reshape([extent or 0 for extent in shape])


def of_sizes_array(array: SizesArray, *, floating: bool = False) -> Value:
    """Return the value that holds these sizes."""
    return of_sizes(list(array.reshape(-1)), array.shape, floating=floating)


def of_sizes(sizes: Sequence[Size | None], shape: Sequence[int], *, floating: bool = False) -> Value:
    """Return the value that holds these sizes, in row-major order."""
    return sizes_value(Value(tuple(plain(Size.of(extent)) for extent in shape), floating=floating), sizes)
