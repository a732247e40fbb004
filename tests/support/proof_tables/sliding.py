"""Windows that slide over positions, and products that sum over an axis.

A case is a graph with the verdicts that the proof of batching must give: whether padding (`seq`) and other rows
(`batch`) can change an answer. By default both are proved: they cannot.
"""

from __future__ import annotations

from attnserve_server.model.manifest import DerivedLength
from proof_cases import MASK, PROVED, REFUTED, UNKNOWN, Case, X, graph

POOLED = "float[batch, 4] y"
SUM = "int64[1] over = {1}, int64[1] last = {-1}"
CHANNELS = "float[batch, 3, seq] x"
SLID = "float[batch, 3, seq] y"
ENDS = "slides a window over the sequence's end"


def on_channels(name: str, nodes: str, given: str = "", outputs: str = SLID, **more: object) -> Case:
    body = graph(nodes, inputs=CHANNELS, outputs=outputs, given=given)
    return Case(name, body, **more)  # type: ignore[arg-type]


CASES = [
    # windows
    on_channels("Conv over what padding makes zero", "y = Conv<pads = [1, 1]>(x, w)", "float[3, 3, 3] w"),
    on_channels("Conv with dilations", "y = Conv<pads = [2, 2], dilations = [2]>(x, w)", "float[3, 3, 3] w"),
    on_channels(
        "Conv over the end",
        "h = Add(x, b) y = Conv<pads = [1, 1]>(h, w)",
        "float[3, 3, 3] w, float[3, 1] b",
        seq=REFUTED,
        why={"seq": ENDS},
    ),
    on_channels(
        "Conv without pads",
        "h = Add(x, b) y = Conv(h, w)",
        "float[3, 3, 3] w, float[3, 1] b",
        "float[batch, 3, short] y",
        derived={"short": DerivedLength(source="seq", stride=1, offset=-2)},
        shortest=3,
    ),
    on_channels(
        "Conv with a stride",
        "h = Add(x, b) y = Conv<strides = [2]>(h, w)",
        "float[3, 3, 2] w, float[3, 1] b",
        "float[batch, 3, half] y",
        derived={"half": DerivedLength(source="seq", stride=2)},
        shortest=2,
    ),
    Case(
        "Conv over what a mask makes zero",
        graph(
            "f = Cast<to = 1>(attention_mask) u = Unsqueeze(f, over) h = Add(x, b) k = Mul(h, u)"
            " y = Conv<pads = [1, 1]>(k, w)",
            f"{CHANNELS}, {MASK}",
            SLID,
            f"{SUM}, float[3, 3, 3] w, float[3, 1] b",
        ),
        needs={"attention_mask": "some"},
    ),
    on_channels("causal Conv", "h = Add(x, b) y = Conv<pads = [2, 0]>(h, w)", "float[3, 3, 3] w, float[3, 1] b"),
    on_channels(
        "Conv filled up before",
        'h = Add(x, b) y = Conv<auto_pad = "SAME_LOWER">(h, w)',
        "float[3, 3, 2] w, float[3, 1] b",
    ),
    on_channels(
        "Conv filled up behind",
        'h = Add(x, b) y = Conv<auto_pad = "SAME_UPPER">(h, w)',
        "float[3, 3, 2] w, float[3, 1] b",
        seq=REFUTED,
        why={"seq": ENDS},
    ),
    Case(
        "Conv over positions as channels",
        graph(
            "y = Conv(x, w)", inputs="float[batch, seq, 4] x", outputs="float[batch, 2, 4] y", given="float[2, 5, 1] w"
        ),
        seq=REFUTED,
        why={"seq": "sums over channels"},
        run=False,
    ),
    on_channels(
        "MaxPool over the end",
        "y = MaxPool<kernel_shape = [3], pads = [1, 1]>(x)",
        seq=REFUTED,
        why={"seq": ENDS},
        content={"x": (-2, -1)},
    ),
    on_channels("causal MaxPool", "y = MaxPool<kernel_shape = [3], pads = [2, 0]>(x)", content={"x": (-2, -1)}),
    on_channels(
        "AveragePool over the end",
        "y = AveragePool<kernel_shape = [3], pads = [1, 1]>(x)",
        seq=REFUTED,
        why={"seq": ENDS},
        content={"x": (1, 2)},
    ),
    on_channels(
        "AveragePool that counts its pads, over zeros",
        "y = AveragePool<kernel_shape = [3], pads = [1, 1], count_include_pad = 1>(x)",
    ),
    on_channels("causal LpPool", "y = LpPool<kernel_shape = [3], pads = [2, 0]>(x)"),
    *(
        on_channels(
            f"{name} over the sequence",
            f"h = Exp(x) y = {name}(h)",
            "",
            "float[batch, 3, 1] y",
            seq=REFUTED,
            why={"seq": "reduces all places to one number"},
            run=name != "GlobalLpPool",
        )
        for name in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
    ),
    Case(
        "ConvInteger",
        graph(
            "c = ConvInteger(x, w) y = Cast<to = 1>(c)",
            "uint8[batch, 3, seq] x",
            "float[batch, 2, seq] y",
            "uint8[2, 3, 1] w",
        ),
    ),
    Case(
        "QLinearConv without pads",
        graph(
            "y = QLinearConv(x, s, z, w, s, z, s, z)",
            "uint8[batch, 3, seq] x",
            "uint8[batch, 2, seq] y",
            "float s = {0.5}, uint8 z = {3}, uint8[2, 3, 1] w",
        ),
    ),
    # products
    Case("MatMul with constants", graph("y = MatMul(x, w)", given="float[4, 4] w")),
    Case(
        "MatMul over zeros",
        graph("t = Transpose<perm = [0, 2, 1]>(x) y = MatMul(t, x)", outputs="float[batch, 4, 4] y"),
    ),
    Case(
        "MatMul over positions",
        graph("e = Exp(x) t = Transpose<perm = [0, 2, 1]>(e) y = MatMul(t, e)", outputs="float[batch, 4, 4] y"),
        seq=REFUTED,
        why={"seq": "sums over padded positions too"},
    ),
    Case("Gemm", graph("y = Gemm<transB = 1>(x, w, b)", "float[batch, 4] x", POOLED, "float[4, 4] w, float[4] b")),
    Case(
        "Gemm over rows",
        graph("t = Gemm<transA = 1>(x, x) y = MatMul(x, t)", "float[batch, 4] x", POOLED),
        batch=REFUTED,
        why={"batch": "sums over the rows of the batch"},
    ),
    Case("Einsum", graph('y = Einsum<equation = "bsd,de->bse">(x, w)', given="float[4, 4] w")),
    Case(
        "Einsum over positions",
        graph('e = Exp(x) y = Einsum<equation = "bsd,de->be">(e, w)', outputs=POOLED, given="float[4, 4] w"),
        seq=REFUTED,
        why={"seq": "sums over padded positions too"},
    ),
    Case(
        "Einsum with dots",
        graph('y = Einsum<equation = "...d,de->...e">(x, w)', given="float[4, 4] w"),
        batch=UNKNOWN,
        seq=UNKNOWN,
        why={"batch": "does not support the equation"},
    ),
    Case("FusedMatMul", graph("y = com.microsoft.FusedMatMul<transB = 1, alpha = 0.5>(x, w)", given="float[4, 4] w")),
    Case(
        "TransposeMatMul",
        graph("y = com.microsoft.TransposeMatMul<transB = 1>(x, w)", given="float[4, 4] w"),
        run=False,
    ),
    Case(
        "two sequences, one of which is reduced",
        graph(
            "t = Transpose<perm = [0, 2, 1]>(z) s = MatMul(x, t) y = ReduceMax<keepdims = 0>(s, last)",
            f"{X}, float[batch, frames, 4] z",
            "float[batch, seq] y",
            SUM,
        ),
        seq={"seq": PROVED, "frames": REFUTED},
        why={"frames": "takes the maximum over padded positions too"},
    ),
]
