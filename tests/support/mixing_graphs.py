"""ONNX graphs generated from a seed, with the known truth about what mixes a sequence with padding or with other rows.

A graph is a chain of pieces over (B, T, width). Each piece knows its own effect, so the truth is built along with the
graph. A piece that lets padding or other rows change a sequence's answer is a poison. `mixing_witness` confirms the
truth by running. The property test of the proof, and `make fuzz-batching`, use these graphs. Any integer from 0 on is a
seed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx
from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.model.manifest import BATCH, DerivedLength, OutputSpec
from mixing_along import FROM_FRONT
from mixing_attention import attention, fused, query_masked
from mixing_forms import (
    FORMS_OF_PADDING,
    FORMS_OF_PADDING_WITH_MASK,
    FORMS_OF_ROWS,
    FORMS_OF_ROWS_WITH_MASK,
    SAFE_FORMS,
)
from mixing_heads import POISONED, WITH_MASK, WITHOUT_MASK, Head
from mixing_inputs import Inputs, stream_of
from mixing_masked import WITH_MASK as MASKED
from mixing_pieces import BY_POSITION
from mixing_poisons import OF_PADDING, OF_PADDING_WITH_MASK, raw_mask, wrongly_masked
from mixing_rows import OF_ROWS, OF_ROWS_WITH_MASK
from mixing_values import LONGEST, NAN_BEHIND, UNSAID, Context, Need, State, Stream
from mixing_writer import Writer
from onnx import TensorProto, helper

RARE = {"reversed by length": 0.2, "dead end": 0.4, "spelled out": 0.6}
"""The frequency of pieces that few models have. Others have frequency 1."""
PADDING_WITH_MASK = {**OF_PADDING_WITH_MASK, **FORMS_OF_PADDING_WITH_MASK}
ROWS_WITH_MASK = {**OF_ROWS_WITH_MASK, **FORMS_OF_ROWS_WITH_MASK}
OPSETS = (11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 23, 23)


@dataclass(frozen=True, slots=True)
class MixingGraph:
    """A graph with its truth.

    Args:
        truths: By output, by axis: the poison that mixes it, "" where nothing does, `UNSAID` where the grammar does not
            know.
        needs: What must hold of masks where the truth is that padding does not mix.
    """

    seed: int
    proto: onnx.ModelProto
    signature: Signature
    outputs: tuple[OutputSpec, ...]
    derived: Mapping[str, DerivedLength]
    truths: Mapping[str, Mapping[str, str]]
    needs: frozenset[Need]
    pieces: tuple[str, ...]
    weights: Mapping[str, Mapping[str, str]]
    """Truths of attention weights, by the prefix of the attention's node names."""

    @property
    def axes(self) -> tuple[str, ...]:
        """`batch`, then the symbols of the inputs."""
        return (BATCH, *self.signature.symbols)

    @property
    def max_lengths(self) -> dict[str, int]:
        """The greatest length of each symbol: tables of positions are that long."""
        return dict.fromkeys(self.signature.symbols, LONGEST)

    def needs_of(self, symbol: str) -> list[Need]:
        """Return what must hold of the masks along a symbol."""
        along = {spec.name for spec in self.signature.inputs if symbol in spec.shape}
        return sorted((need for need in self.needs if need.input in along), key=str)

    def poison(self, axis: str) -> str:
        """Return the poison of any output along an axis: "" if nothing mixes; `UNSAID` if that is not known."""
        found = [each[axis] for each in self.truths.values()]
        named = [poison for poison in found if poison and poison != UNSAID]
        return (named or [poison for poison in found if poison] or [""])[0]


def mixing_graph(seed: int) -> MixingGraph:
    """Return the graph of a seed. It is always the same one."""
    rng = random.Random(seed)
    context = Context(Writer(rng, rng.choice(OPSETS)))
    inputs = Inputs()
    aim = rng.choices(["nothing", "padding", "rows", "head"], [0.5, 0.25, 0.21, 0.04])[0]
    stream = stream_of(context, inputs, "t", "")
    crossed = rng.random() < 0.2
    if crossed:
        stream = _crossed(context, inputs, stream, aim)
    else:
        stream, early = _chain(context, stream, aim)
    heads = [stream] if crossed or rng.random() < 0.7 else [stream, early]
    return _finished(seed, context, inputs, heads, aim)


def _chain(context: Context, stream: Stream, aim: str, most: int = 4) -> tuple[Stream, Stream]:
    """Return a chain of pieces, one of which is `aim`, and a stream from before its end."""
    rng = context.writer.rng
    count = rng.randint(1, most)
    place = rng.randrange(count) if aim in {"padding", "rows"} else -1
    passed = [stream]
    for number in range(count):
        piece = _poison(context, passed[-1], aim) if number == place else _safe(context, passed[-1])
        passed.append(piece)
    return passed[-1], rng.choice(passed[:-1])


def _safe(context: Context, stream: Stream) -> Stream:
    masked = stream.symbol in context.masks
    pieces = {**BY_POSITION, **FROM_FRONT, **SAFE_FORMS, "attention": attention, "fused attention": fused}
    if masked:
        pieces |= {**MASKED, "attention again": attention, "query mask": query_masked}
    names = sorted(pieces)
    name = context.writer.rng.choices(names, [RARE.get(name, 1.0) for name in names])[0]
    context.begin(name)
    return pieces[name](context, stream)


def _poison(context: Context, stream: Stream, aim: str) -> Stream:
    masked = stream.symbol in context.masks
    if aim == "padding":
        pieces = {**OF_PADDING, **FORMS_OF_PADDING, **(PADDING_WITH_MASK if masked else {})}
        if stream.symbol in context.wrong_masks:
            pieces |= dict.fromkeys(("wrong mask", "wrong mask again", "wrong mask too"), wrongly_masked)
        if masked and stream.state.raw:
            pieces |= {"raw mask": raw_mask}
    else:
        pieces = {**OF_ROWS, **FORMS_OF_ROWS, **(ROWS_WITH_MASK if masked else {})}
    name = context.writer.rng.choice(sorted(pieces))
    context.begin(name)
    return pieces[name](context, stream)


def _crossed(context: Context, inputs: Inputs, stream: Stream, aim: str) -> Stream:
    """Return a stream that attends to a second sequence."""
    rng = context.writer.rng
    context.writer.prefix = "second"
    second = stream_of(context, inputs, "s", "encoder_")
    where = rng.choice(["first", "second", "last"])
    second, _ = _chain(context, second, aim if where == "second" else "nothing", 2)
    stream, _ = _chain(context, stream, aim if where == "first" else "nothing", 2)
    if second.width != stream.width:
        changed = context.writer.matmul(second.name, second.width, stream.width)
        second = replace(second, name=changed, width=stream.width, state=second.state.finite())
    context.begin("cross attention")
    if "s" in context.masks:
        stream = attention(context, stream, second)
    else:
        # Without a mask of the keys, only their first position may be taken.
        first = context.writer.op("Gather", second.name, context.writer.ints(0), axis=1)
        name = context.writer.op("Add", stream.name, first)
        stream = replace(stream, name=name, state=_one_of(stream.state, second.state))
    return _chain(context, stream, aim if where == "last" else "nothing", 2)[0]


def _one_of(state: State, other: State) -> State:
    """Return the state of a stream to which one position of another sequence is added."""
    return state.joined(replace(other, behind="finite"))


def _truth(state: State, symbols: tuple[str, ...]) -> dict[str, str]:
    """Return the poison by axis. Where padding makes all values NaN, other mixing may not show."""
    found = {axis: state.taint.get(axis, "") for axis in (BATCH, *symbols)}
    if NAN_BEHIND not in found.values():
        return found
    return {axis: poison if poison in {"", NAN_BEHIND} else UNSAID for axis, poison in found.items()}


def _finished(seed: int, context: Context, inputs: Inputs, streams: list[Stream], aim: str) -> MixingGraph:
    writer = context.writer
    made: list[Head] = []
    for number, stream in enumerate(streams):
        heads = {**WITHOUT_MASK, **(WITH_MASK if stream.symbol in context.masks else {})}
        if aim == "head" and number == 0:
            heads = POISONED
        name = writer.rng.choice(sorted(heads))
        context.begin(f"head: {name}")
        made.append(heads[name](context, stream))
    outputs: list[OutputSpec] = []
    derived: dict[str, DerivedLength] = {}
    truths: dict[str, dict[str, str]] = {}
    symbols = tuple(dict.fromkeys(extent for spec in inputs.specs for extent in spec.shape if isinstance(extent, str)))
    values = []
    for number, head in enumerate(made):
        name = f"output_{number}"
        writer.nodes.append(helper.make_node("Identity", [head.name], [name], name=f"{name}_node"))
        values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", *head.shape]))
        outputs.append(OutputSpec(name=name, dtype="float32", shape=head.shape))
        derived |= head.derived
        truths[name] = _truth(head.state, symbols)
    graph = helper.make_graph(writer.nodes, f"mixing_{seed}", inputs.values, values, writer.constants)
    opsets = [helper.make_opsetid("", writer.opset)]
    opsets += [helper.make_opsetid(domain, 1) for domain in sorted(writer.domains - {""})]
    proto = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    return MixingGraph(
        seed=seed,
        proto=proto,
        signature=Signature(tuple(inputs.specs), symbols),
        outputs=tuple(outputs),
        derived=derived,
        truths=truths,
        needs=frozenset().union(*(head.state.needs for head in made)),
        pieces=tuple(context.pieces),
        weights={prefix: _truth(state, symbols) for prefix, state in context.weights.items()},
    )
