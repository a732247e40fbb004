"""CUDA graphs: the recorded shape of a run, and how the run is filled up. Replaying needs a GPU: tests/gpu.

A shape is (rows, tokens). `shape_for` returns None where no recorded shape holds a run.
"""

from __future__ import annotations

import numpy as np
import pytest
from attnserve_server.engine.gpu import filled_up, shape_for

SHAPES = ((1, 32), (8, 32), (4, 128))


@pytest.mark.parametrize(
    ("rows", "tokens", "shape"),
    [(1, 32, (1, 32)), (1, 33, (4, 128)), (2, 8, (8, 32)), (8, 32, (8, 32)), (9, 8, None), (5, 33, None)],
)
def test_run_takes_the_smallest_shape_that_holds_it(rows: int, tokens: int, shape: tuple[int, int] | None) -> None:
    assert shape_for(rows, tokens, SHAPES) == shape


def test_tokens_are_padded_and_rows_repeat_the_first() -> None:
    full = filled_up(np.array([[5, 6], [7, 0]], np.int64), (4, 3), padding=9)
    assert full.tolist() == [[5, 6, 9], [7, 0, 9], [5, 6, 9], [5, 6, 9]]
    assert full.dtype == np.int64
