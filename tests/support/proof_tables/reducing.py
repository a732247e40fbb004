"""Operators that combine positions: sums, means, running sums, normalisations.

A case is a graph with the verdicts that the proof of batching must give: whether padding (`seq`) and other rows
(`batch`) can change an answer. By default both are proved: they cannot.
"""

from __future__ import annotations

from proof_cases import MASK, REFUTED, Case, X, graph

from proof_tables.sliding import POOLED, SUM, on_channels

MASKED = f"{X}, {MASK}"
KEPT = "f = Cast<to = 1>(attention_mask) u = Unsqueeze(f, last)"

_OVER = (
    "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSum ReduceLogSumExp"
)


CASES = [
    *(
        Case(
            f"{name} over the sequence",
            graph(
                f"h = {'Abs' if name == 'ReduceProd' else 'Exp'}(x) y = {name}<keepdims = 0>(h, over)",
                outputs=POOLED,
                given=SUM,
            ),
            seq=REFUTED,
            why={"seq": "padded positions too"},
        )
        for name in _OVER.split()
    ),
    *(
        Case(
            f"{name} of each vector",
            graph(f"h = Exp(x) y = {name}<keepdims = 0>(h, last)", outputs="float[batch, seq] y", given=SUM),
        )
        for name in _OVER.split()
    ),
    Case(
        "ReduceMean over the batch",
        graph("m = ReduceMean(x, rows) y = Sub(x, m)", given="int64[1] rows = {0}"),
        batch=REFUTED,
        why={"batch": "takes the mean over the other rows of the batch too"},
    ),
    *(
        Case(
            f"{name} of what a mask makes zero",
            graph(f"{KEPT} e = Exp(x) h = Mul(e, u) y = {name}<keepdims = 0>(h, over)", MASKED, POOLED, SUM),
            needs={"attention_mask": "some"},
        )
        for name in ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare")
    ),
    Case(
        "a mean over what a mask allows",
        graph(
            f"{KEPT} h = Mul(x, u) s = ReduceSum<keepdims = 0>(h, over) k = ReduceSum<keepdims = 0>(u, over)"
            " c = Clip(k, least) y = Div(s, c)",
            MASKED,
            POOLED,
            f"{SUM}, float least = {{1e-9}}",
        ),
        needs={"attention_mask": "some"},
    ),
    Case(
        "the greatest of what a mask leaves",
        graph(
            "b = Cast<to = 9>(attention_mask) u = Unsqueeze(b, last) h = Where(u, x, low)"
            " y = ReduceMax<keepdims = 0>(h, over)",
            MASKED,
            POOLED,
            f"{SUM}, float low = {{-inf}}",
        ),
        needs={"attention_mask": "some"},
    ),
    Case("CumSum", graph("y = CumSum(x, axis)", given="int64 axis = {1}")),
    Case(
        "CumSum in reverse",
        graph("e = Exp(x) y = CumSum<reverse = 1>(e, axis)", given="int64 axis = {1}"),
        seq=REFUTED,
        why={"seq": "computes a running sum from the end"},
    ),
    Case("CumSum in reverse over zeros", graph("y = CumSum<reverse = 1>(x, axis)", given="int64 axis = {1}")),
    Case(
        "CumSum over rows",
        graph("y = CumSum(x, axis)", given="int64 axis = {0}"),
        batch=REFUTED,
        why={"batch": "computes a running sum over the rows of the batch"},
    ),
    *(
        Case(
            f"{name} over the sequence",
            graph(
                f"h = {inner}(x) i = {name}<axis = 1, keepdims = 0>(h) y = Cast<to = 1>(i)", outputs=POOLED, given=SUM
            ),
            seq=REFUTED,
            why={"seq": "finds the place of the greatest"},
        )
        for name, inner in (("ArgMax", "Neg"), ("ArgMin", "Identity"))
    ),
    Case(
        "ArgMax of each vector",
        graph("i = ArgMax<axis = 2, keepdims = 0>(x) y = Cast<to = 1>(i)", outputs="float[batch, seq] y"),
    ),
    Case(
        "the state at the greatest id",
        graph(
            "k = ArgMax<axis = 1, keepdims = 0>(input_ids) i = Unsqueeze(k, last) e = Gather(w, input_ids)"
            " y = GatherND<batch_dims = 1>(e, i)",
            "int64[batch, seq] input_ids",
            POOLED,
            f"{SUM}, float[6, 4] w",
        ),
    ),
    # normalisations
    *(
        Case(name, graph(f"y = {name}(x, g)", given="float[4] g"), run=name == "LayerNormalization")
        for name in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
    ),
    Case(
        "LayerNormalization over positions too",
        graph("h = Exp(x) y = LayerNormalization<axis = 1>(h, g)", given="float[4] g = {1, 1, 1, 1}"),
        seq=REFUTED,
        why={"seq": "normalises over padded positions too"},
    ),
    *(
        Case(
            f"{name} of onnxruntime",
            graph(
                f"y = com.microsoft.{name}(x, x, g)" if name.startswith("Skip") else f"y = {name}(x, g)",
                given="float[4] g",
            )
            .replace("y = Simplified", "y = com.microsoft.Simplified")
            .replace("y = RMS", "y = com.microsoft.RMS"),
            run=name.startswith("Skip"),
        )
        for name in (
            "SkipLayerNormalization",
            "SkipSimplifiedLayerNormalization",
            "SimplifiedLayerNormalization",
            "RMSNormalization",
        )
    ),
    on_channels(
        "InstanceNormalization over positions",
        "h = Exp(x) y = InstanceNormalization(h, g, b)",
        "float[3] g = {1, 1, 1}, float[3] b = {0, 0, 0}",
        seq=REFUTED,
        why={"seq": "normalises over padded positions too"},
        shortest=2,
    ),
    on_channels(
        "GroupNormalization over positions",
        "h = Exp(x) y = GroupNormalization<num_groups = 1>(h, g, b)",
        "float[3] g = {1, 1, 1}, float[3] b = {0, 0, 0}",
        seq=REFUTED,
        why={"seq": "normalises over padded positions too"},
        run=False,
    ),
    Case("LpNormalization of each vector", graph("y = LpNormalization<axis = -1>(x)", given="")),
    Case(
        "LpNormalization over positions",
        graph("h = Exp(x) y = LpNormalization<axis = 1>(h)"),
        seq=REFUTED,
        why={"seq": "normalises over padded positions too"},
    ),
    Case(
        "MeanVarianceNormalization over rows",
        graph("y = MeanVarianceNormalization<axes = [0]>(x)"),
        batch=REFUTED,
        why={"batch": "normalises over the other rows of the batch too"},
    ),
]
