"""The tap of linear attention: computes, for the selected rows, the weights that its features imply.

items (n,) -+-> Gather(phi(Q)) -+-> MatMul -> (n, H, L, S) -> / sum over keys -> weights
            +-> Gather(phi(K)) -+
"""

from __future__ import annotations

import onnx_ir as ir

from attnserve_server.conversion.base.sites import Features, Linear
from attnserve_server.conversion.rewrite.taps.tap import Tap


def weights_of_linear(tap: Tap, linear: Linear) -> ir.Value:
    """Return A[i, j] = phi(q_i) . phi(k_j) / sum over j' of phi(q_i) . phi(k_j'), float32 (n, H, L, S).

    Masked keys have features of 0, and so weights of 0. A row in which every key is masked is 0.
    Source: Katharopoulos et al. 2020, eq. 4 and 5.
    """
    query, key = (_heads_first(tap, features) for features in (linear.query, linear.key))
    dots = tap.op("MatMul", [query, tap.op("Transpose", [key], perm=[0, 1, 3, 2])])
    sums = tap.reduce("ReduceSum", dots, 3)
    zero = tap.number(0.0)
    return tap.op("Where", [tap.op("Equal", [sums, zero]), zero, tap.op("Div", [dots, sums])])


def _heads_first(tap: Tap, features: Features) -> ir.Value:
    """Return the selected rows, float32 (n, H, T, D)."""
    batch = features.order[0]
    rows = tap.op("Gather", [features.value, tap.items], axis=batch)
    if features.order != tuple(range(len(features.order))):
        rows = tap.op("Transpose", [rows], perm=features.order)
    if len(features.order) == 3:
        rows = tap.unsqueeze(rows, 1)
    return rows if features.value.dtype is ir.DataType.FLOAT else tap.float32(rows)
