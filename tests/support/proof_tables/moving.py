"""Operators that move elements.

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


MOVED = [
    _case(
        "Transpose there and back", "t = Transpose<perm = [1, 0, 2]>(x) h = Exp(t) y = Transpose<perm = [1, 0, 2]>(h)"
    ),
    _case(
        "Reshape that folds rows and positions and unfolds them the same way",
        f"{SHAPE} h = Reshape(x, flat) g = MatMul(h, w) y = Reshape(g, n)",
        given="int64[2] flat = {-1, 4}, float[4, 4] w",
    ),
    _case(
        "Reshape that unfolds rows and positions in the other order",
        "b = Shape<start = 0, end = 1>(x) s = Shape<start = 1, end = 2>(x) turned = Concat<axis = 0>(s, b, last)"
        " h = Reshape(x, turned) y = Transpose<perm = [1, 0, 2]>(h)",
        given=NUMBERS,
        batch=UNKNOWN,
        seq=UNKNOWN,
        why={"batch": "", "seq": ""},
    ),
    _case(
        "Reshape into heads",
        "h = Reshape(x, heads) e = Exp(h) y = Reshape(e, joint)",
        given="int64[4] heads = {0, 0, 2, 2}, int64[3] joint = {0, 0, 4}",
    ),
    _case("Flatten of plain axes", "y = Flatten(x)", inputs="float[batch, 2, 3] x", outputs="float[batch, 6] y"),
    _case("Squeeze and Unsqueeze", "u = Unsqueeze(x, over) e = Exp(u) y = Squeeze(e, over)", given=NUMBERS),
    _case(
        "Concat along the channels",
        "e = Exp(x) y = Concat<axis = -1>(x, e)",
        outputs="float[batch, seq, 8] y",
    ),
    _case(
        "Concat before positions",
        "y = Concat<axis = 1>(c, x)",
        inputs=f"{X}, float[batch, 1, 4] c",
        outputs="float[batch, more, 4] y",
        derived=ONE_MORE,
    ),
    _case(
        "Concat behind positions",
        "e = Exp(x) c = Concat<axis = 1>(e, x) y = ReduceMean<keepdims = 0>(c, over)",
        outputs=POOLED,
        given=NUMBERS,
        seq=REFUTED,
        why={"seq": "appends a varying part behind padded positions"},
    ),
    _case(
        "Concat of rows",
        "h = Concat<axis = 0>(x, x) y = ReduceMax(h, first)",
        outputs="float[1, seq, 4] y",
        given=NUMBERS,
        batch=REFUTED,
        why={"batch": "appends a varying part behind the other rows of the batch"},
        run=False,
    ),
    _case(
        "Split of channels",
        "a, b = Split<axis = 2, num_outputs = 2>(x) y = Mul(a, b)",
        outputs="float[batch, seq, 2] y",
    ),
    _case("the first position", "s = Slice(x, first, over, over) y = Squeeze(s, over)", outputs=POOLED, given=NUMBERS),
    _case(
        "the last position",
        "s = Slice(x, last, end, over) y = Squeeze(s, over)",
        outputs=POOLED,
        given=f"{NUMBERS}, int64[1] end = {{9223372036854775807}}",
        seq=REFUTED,
        why={"seq": "takes positions from the end"},
    ),
    _case(
        "positions reversed",
        "y = Slice(x, last, end, over, last)",
        given=f"{NUMBERS}, int64[1] end = {{-9223372036854775807}}",
        seq=REFUTED,
        why={"seq": "reverses the order"},
    ),
    _case(
        "all positions but the first",
        "y = Slice(x, over, end, over)",
        outputs="float[batch, less, 4] y",
        given=f"{NUMBERS}, int64[1] end = {{9223372036854775807}}",
        derived=ONE_LESS,
    ),
    _case(
        "all positions but the last",
        "y = Slice(x, first, last, over)",
        outputs="float[batch, less, 4] y",
        given=NUMBERS,
        derived=ONE_LESS,
    ),
    _case(
        "the first rows",
        "s = Slice(x, first, over, first) y = Add(x, s)",
        given=NUMBERS,
        batch=REFUTED,
        why={"batch": "takes fixed rows of the batch"},
    ),
    _case(
        "channels reversed",
        "y = Slice(x, last, end, last, last)",
        given=f"{NUMBERS}, int64[1] end = {{-9223372036854775807}}",
    ),
    _case("a shift behind a zero", "y = Pad(x, pads)", given="int64[6] pads = {0, 1, 0, 0, -1, 0}"),
    _case(
        "Pad before positions",
        "h = Exp(x) y = Pad(h, pads)",
        outputs="float[batch, more, 4] y",
        given="int64[6] pads = {0, 1, 0, 0, 0, 0}",
        derived=ONE_MORE,
    ),
    _case(
        "Pad behind positions",
        "h = Exp(x) p = Pad(h, pads) y = ReduceSum<keepdims = 0>(p, over)",
        outputs=POOLED,
        given=f"{NUMBERS}, int64[6] pads = {{0, 0, 0, 0, 1, 0}}",
        seq=REFUTED,
        why={"seq": "sums over padded positions"},
    ),
    _case(
        "Pad with copies of the end",
        'p = Pad<mode = "edge">(x, pads) y = Slice(p, over, end, over)',
        given=f"{NUMBERS}, int64[6] pads = {{0, 0, 0, 0, 1, 0}}, int64[1] end = {{9223372036854775807}}",
        seq=REFUTED,
        why={"seq": "repeats positions at the end"},
    ),
    _case(
        "Pad of channels",
        "y = Pad(x, pads)",
        outputs="float[batch, seq, 5] y",
        given="int64[6] pads = {0, 0, 0, 0, 0, 1}",
    ),
    _case("Tile along channels", "y = Tile(x, by)", outputs="float[batch, seq, 8] y", given="int64[3] by = {1, 1, 2}"),
    _case(
        "Tile along positions",
        "t = Tile(x, by) y = ReduceMean<keepdims = 0>(t, over)",
        outputs=POOLED,
        given=f"{NUMBERS}, int64[3] by = {{1, 2, 1}}",
        seq=REFUTED,
        why={"seq": "repeats positions in the place of padded positions"},
    ),
    _case("Expand to the shape of another", f"{SHAPE} e = Expand(w, n) y = Add(x, e)", given="float[4] w"),
    _case("ConstantOfShape", f"{SHAPE} e = ConstantOfShape<value = float[1] {{2}}>(n) y = Mul(x, e)"),
    _case(
        "Size of one vector",
        "v = Gather<axis = 2>(x, zero) k = Size(w) f = Cast<to = 1>(k) y = Mul(v, f)",
        outputs="float[batch, seq] y",
        given=f"{NUMBERS}, float[4] w",
    ),
    _case(
        "Size of all",
        "k = Size(x) f = Cast<to = 1>(k) y = Div(x, f)",
        batch=REFUTED,
        seq=REFUTED,
        why={"batch": "the number of rows", "seq": "the padded length"},
    ),
    _case(
        "DepthToSpace",
        "y = DepthToSpace<blocksize = 2>(x)",
        inputs="float[batch, 4, 2, 2] x",
        outputs="float[batch, 1, 4, 4] y",
    ),
    _case(
        "SpaceToDepth",
        "y = SpaceToDepth<blocksize = 2>(x)",
        inputs="float[batch, 1, 4, 4] x",
        outputs="float[batch, 4, 2, 2] y",
    ),
    _case(
        "ReverseSequence up to a length that a mask counts",
        "k = ReduceSum<keepdims = 0>(attention_mask, over) y = ReverseSequence<batch_axis = 0, time_axis = 1>(x, k)",
        inputs=f"{X}, {MASK}",
        given=NUMBERS,
        needs={"attention_mask": "some"},
    ),
    _case(
        "ReverseSequence up to the padded length",
        f"{SHAPE} b = Shape<start = 0, end = 1>(x) l = Shape<start = 1, end = 2>(x) k = Expand(l, b)"
        " y = ReverseSequence<batch_axis = 0, time_axis = 1>(x, k)",
        seq=UNKNOWN,
    ),
    _case("Identity of onnxruntime", "y = com.microsoft.Identity(x)", run=False),
    _case("StopGradient", "y = com.microsoft.StopGradient(x)", run=False),
    _case(
        "sequences of tensors",
        "s = SplitToSequence<axis = 2>(x) y = ConcatFromSequence<axis = 2>(s)",
        batch=UNKNOWN,
        seq=UNKNOWN,
    ),
    _case(
        "a shift by a slice and a copy of the first position",
        "h = Exp(x) c = Slice(h, first, last, over) f = Slice(h, first, over, over) y = Concat<axis = 1>(f, c)",
        given=NUMBERS,
    ),
    _case(
        "positions from a buffer that is cut to the length",
        "n = Shape<start = 1, end = 2>(x) p = Slice(buffer, first, n, over) e = Gather(w, p) y = Add(x, e)",
        given=f"{NUMBERS}, float[16, 4] w, int64[1, 16] buffer = {{{', '.join(map(str, range(16)))}}}",
        longest=16,
    ),
]
