"""Operators that take elements by index, write to places, or draw random elements.

A case is a graph with the verdicts that the proof of batching must give: whether padding (`seq`) and other rows
(`batch`) can change an answer. By default both are proved: they cannot.
"""

from __future__ import annotations

from attnserve_server.model.manifest import DerivedLength
from proof_cases import MASK, REFUTED, UNKNOWN, Case, X, graph

POOLED = "float[batch, 4] y"
NUMBERS = "int64 zero = {0}, int64 one = {1}, int64[1] first = {0}, int64[1] over = {1}, int64[1] last = {-1}"
SHAPE = "n = Shape(x)"
LENGTH = "n = Shape<start = 1, end = 2>(x)"
ONE_MORE = {"more": DerivedLength(source="seq", stride=1, offset=1)}
ONE_LESS = {"less": DerivedLength(source="seq", stride=1, offset=-1)}
IDS = "int64[batch, seq] input_ids"
INDEX = "int64[batch, seq, 4] i"


def _case(name: str, nodes: str, **more: object) -> Case:
    parts = {key: str(more.pop(key)) for key in ("inputs", "outputs", "given") if key in more}
    return Case(name, graph(nodes, **parts), **more)  # type: ignore[arg-type]


TAKEN = [
    _case("a table by ids", "y = Gather(w, input_ids)", inputs=IDS, given="float[6, 4] w"),
    _case("the first position by index", "y = Gather<axis = 1>(x, zero)", outputs=POOLED, given=NUMBERS),
    _case(
        "the last position by index",
        "i = Squeeze(last) y = Gather<axis = 1>(x, i)",
        outputs=POOLED,
        given=NUMBERS,
        seq=REFUTED,
        why={"seq": "takes a position counted from the end"},
    ),
    _case(
        "the last position by the length",
        f"{LENGTH} e = Squeeze(n) i = Sub(e, one) y = Gather<axis = 1>(x, i)",
        outputs=POOLED,
        given=NUMBERS,
        seq=REFUTED,
        why={"seq": "takes a position counted from the end"},
    ),
    _case(
        "a position that the content names",
        "y = GatherElements<axis = 1>(x, i)",
        inputs=f"{X}, {INDEX}",
        content={"i": (0, 1)},
        seq=UNKNOWN,
    ),
    _case(
        "channels that the content names",
        "y = GatherElements<axis = 2>(x, i)",
        inputs=f"{X}, {INDEX}",
        content={"i": (0, 4)},
    ),
    _case(
        "elements of rows that the content names",
        "y = GatherElements<axis = 0>(x, i)",
        inputs="float[batch, 4] x, int64[batch, 4] i",
        outputs=POOLED,
        content={"i": (0, 1)},
        batch=REFUTED,
        why={"batch": "takes elements of other rows"},
    ),
    _case(
        "GatherND of the last position that a mask allows",
        "k = ReduceSum<keepdims = 0>(attention_mask, over) j = Sub(k, one) i = Unsqueeze(j, last)"
        " y = GatherND<batch_dims = 1>(x, i)",
        inputs=f"{X}, {MASK}",
        outputs=POOLED,
        given=NUMBERS,
        needs={"attention_mask": "some"},
    ),
    _case(
        "GatherND of the position before that",
        "k = ReduceSum<keepdims = 0>(attention_mask, over) j = Sub(k, two) i = Unsqueeze(j, last)"
        " y = GatherND<batch_dims = 1>(x, i)",
        inputs=f"{X}, {MASK}",
        outputs=POOLED,
        given=f"{NUMBERS}, int64 two = {{2}}",
        seq=UNKNOWN,
    ),
    _case(
        "TopK of the sequence",
        "s = ReduceSum<keepdims = 0>(x, last) v, i = TopK(s, k) y = Identity(v)",
        outputs="float[batch, 2] y",
        given=f"{NUMBERS}, int64[1] k = {{2}}",
        shortest=2,
        seq=REFUTED,
        why={"seq": "takes the greatest elements"},
    ),
    _case(
        "TopK of what a mask leaves",
        "s = ReduceSum<keepdims = 0>(x, last) b = Cast<to = 9>(attention_mask) h = Where(b, s, low)"
        " v, i = TopK(h, k) y = Identity(v)",
        inputs=f"{X}, {MASK}",
        outputs="float[batch, 2] y",
        given=f"{NUMBERS}, int64[1] k = {{2}}, float low = {{-inf}}",
        shortest=2,
        needs={"attention_mask": "some"},
    ),
    _case(
        "TopK of each vector",
        "v, i = TopK(x, k) f = Cast<to = 1>(i) y = Add(v, f)",
        outputs="float[batch, seq, 2] y",
        given="int64[1] k = {2}",
    ),
    _case(
        "NonZero of content",
        "z = NonZero(x) n = Shape<start = 1, end = 2>(z) f = Cast<to = 1>(n) y = Mul(x, f)",
        batch=UNKNOWN,
        seq=UNKNOWN,
    ),
    _case(
        "Unique of content", "u = Unique(x) n = Shape(u) f = Cast<to = 1>(n) y = Mul(x, f)", batch=UNKNOWN, seq=UNKNOWN
    ),
    _case(
        "Compress by content",
        "r = Reshape(x, last) b = Cast<to = 9>(r) u = Compress(r, b) s = ReduceSum(u) y = Mul(x, s)",
        given=NUMBERS,
        batch=REFUTED,
        seq=REFUTED,
        why={"batch": "selects among all elements"},
        run=False,
    ),
    _case(
        "ScatterND into rows",
        "y = ScatterND(x, i, u)",
        inputs="float[batch, 4] x",
        outputs=POOLED,
        given="int64[1, 1] i = {0}, float[1, 4] u",
        batch=REFUTED,
        why={"batch": "writes to places in the batch"},
    ),
    *(
        _case(
            f"{name} along channels",
            f"y = {name}<axis = 2>(x, i, u)",
            inputs=f"{X}, {INDEX}, float[batch, seq, 4] u",
            content={"i": (0, 4)},
            run=name != "Scatter",
        )
        for name in ("ScatterElements", "Scatter")
    ),
    _case(
        "ScatterElements along positions",
        'y = ScatterElements<axis = 1, reduction = "add">(x, i, u)',
        inputs=f"{X}, {INDEX}, float[batch, seq, 4] u",
        content={"i": (0, 1)},
        seq=UNKNOWN,
    ),
    _case(
        "OneHot",
        "y = OneHot(input_ids, depth, values)",
        inputs=IDS,
        outputs="float[batch, seq, 6] y",
        given="int64 depth = {6}, float[2] values = {0, 1}",
    ),
    _case(
        "LabelEncoder",
        "h = Cast<to = 7>(x) y = ai.onnx.ml.LabelEncoder<keys_int64s = [0, 1], values_floats = [2.0, 3.0]>(h)",
    ),
    _case("CategoryMapper", "y = ai.onnx.ml.CategoryMapper(x)", run=False),
    _case("Trilu of plain axes", "y = Trilu(x)", inputs="float[batch, 3, 3] x", outputs="float[batch, 3, 3] y"),
    _case(
        "Trilu over the batch",
        "y = Trilu(x)",
        inputs="float[batch, 3] x",
        outputs="float[batch, 3] y",
        batch=UNKNOWN,
        why={"batch": "a triangle of unequal sides"},
    ),
    _case("EyeLike of plain axes", "e = EyeLike(w) y = MatMul(x, e)", given="float[4, 4] w"),
    *(
        _case(
            f"{name}",
            nodes,
            given="float[1, 4] w",
            batch=REFUTED,
            seq=REFUTED,
            why={"batch": "draws random numbers", "seq": "draws random numbers"},
            opset=21,
        )
        for name, nodes in (
            ("RandomNormal", "r = RandomNormal<shape = [4]>() y = Add(x, r)"),
            ("RandomUniform", "r = RandomUniform<shape = [4]>() y = Add(x, r)"),
            ("RandomNormalLike", "r = RandomNormalLike(x) y = Add(x, r)"),
            ("RandomUniformLike", "r = RandomUniformLike(x) y = Add(x, r)"),
            ("Multinomial", "r = Multinomial<sample_size = 4>(w) f = Cast<to = 1>(r) y = Add(x, f)"),
            ("Bernoulli", "p = Sigmoid(x) r = Bernoulli(p) y = Add(x, r)"),
        )
    ),
    _case(
        "an operator of an unknown domain, times zero",
        "e = elsewhere.Odd(x) y = Mul(e, nothing)",
        given="float nothing = {0}",
        batch=UNKNOWN,
        seq=UNKNOWN,
        why={"batch": "no rule for the operator elsewhere.Odd", "seq": "no rule for the operator elsewhere.Odd"},
        run=False,
    ),
    _case(
        "an operator of an unknown domain, in a branch that is not taken",
        "e = elsewhere.Odd(x) y = Where(no, e, x)",
        given="bool no = {0}",
        batch=UNKNOWN,
        seq=UNKNOWN,
        run=False,
    ),
    _case("a fixed batch", "y = Softmax<axis = 0>(x)", inputs="float[1, seq, 4] x", outputs="float[1, seq, 4] y"),
]
