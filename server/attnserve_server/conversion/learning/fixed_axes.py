"""Names the fixed axes of sites by what their positions come from, and finds the patch grids of images among them.

An axis of a site (one attention computation) is fixed where its length is the same in every run. Nothing is run here.
The shapes of 49 patches and 49 words are equal. But projections, norms and residuals keep positions: the walk from
queries and keys back through nodes that read one value shows whether two sides come from one sequence. It ends at
products of two activations, attention itself above all, because there one sequence takes from another:

    pixels -> Conv -> + positions -> MatMul -> queries        both walks meet in the Conv: one sequence, `fixed_49`
                                  -> MatMul -> keys
    ids -> Gather -> ... -> queries of 49 words               this walk does not: another sequence, `fixed_49_`
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from attnserve_server.conversion.base.sites import FoundSite, Linear, Probabilities, Scores
from attnserve_server.conversion.graphs.contraction import Contraction
from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.model.manifest import InputSpec

MOST_LEADING = 8
"""The most positions before the patches: a class token, a distillation token, registers."""
_CHANNELS = {1, 3, 4}
_ATTENTION = {"Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedMultiHeadAttention", "LSTM", "GRU"}
_PRODUCTS = {"MatMul", "Gemm", "Einsum", "MatMulInteger", "FusedMatMul"}
_FIRST_ALONE = {"Reshape", "Expand", "Tile", "Slice", "Unsqueeze", "Squeeze", "Pad", "Resize", "TopK", "Split"}
"""Operators whose further inputs are shapes and indices, not data."""
_NO_DATA = {"Shape", "Size", "ConstantOfShape", "Range", "NonZero"}
"""Operators whose outputs depend on a size, not on content."""

Side = tuple[str, int]
"""A site's name, with 0 for its queries and 1 for its keys."""


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """The patches of an image, row by row, after `leading` positions such as that of a class token."""

    rows: int
    columns: int
    leading: int = 0


@dataclass(frozen=True, slots=True)
class Origin:
    """What the positions of one side of a site come from: values on the way back, and names of graph inputs."""

    values: frozenset[ir.Value] = field(default_factory=frozenset)
    inputs: frozenset[str] = field(default_factory=frozenset)

    def may_be(self, other: Origin) -> bool:
        """Whether both may come from one sequence: they share a value, or one of them is unknown."""
        return not self.values or not other.values or not self.values.isdisjoint(other.values)


@dataclass(frozen=True, slots=True)
class FixedAxes:
    """The fixed axes of sites: a symbol for each fixed side, and each symbol's length and origin."""

    symbols: Mapping[Side, str]
    lengths: Mapping[str, int]
    origins: Mapping[str, Origin]


def fixed_axes(
    axes: Mapping[str, tuple[str | int | None, str | int | None]],
    sites: Mapping[str, FoundSite],
    taken: Collection[str],
) -> FixedAxes:
    """Name the fixed axes of sites `fixed_<length>`; one of equal length and another sequence gets another name.

    Args:
        axes: the query axis and the key axis of each site; those that are whole numbers are named.
        sites: in the order of their layers.
        taken: symbols of other axes.
    """
    groups: list[tuple[int, Origin]] = []
    member: dict[Side, int] = {}
    for name, pair in axes.items():
        for side, length in enumerate(pair):
            if isinstance(length, int):
                member[name, side] = _joined(groups, length, _origin(sites[name], side))
    symbols: list[str] = []
    for length, _ in groups:
        symbol = f"fixed_{length}"
        while symbol in taken or symbol in symbols:
            symbol += "_"
        symbols.append(symbol)
    return FixedAxes(
        symbols={side: symbols[group] for side, group in member.items()},
        lengths={symbol: length for symbol, (length, _) in zip(symbols, groups, strict=True)},
        origins={symbol: origin for symbol, (_, origin) in zip(symbols, groups, strict=True)},
    )


def of_one_sequence(site: FoundSite) -> bool:
    """Whether a site's queries and keys come from the same positions; True where either is unknown."""
    return _origin(site, 0).may_be(_origin(site, 1))


def _joined(groups: list[tuple[int, Origin]], length: int, origin: Origin) -> int:
    """Return the index of the group that a side belongs to; add a group where no group of its length shares a value."""
    for at, (other, known) in enumerate(groups):
        if other == length and known.may_be(origin):
            groups[at] = (length, Origin(known.values | origin.values, known.inputs | origin.inputs))
            return at
    groups.append((length, origin))
    return len(groups) - 1


def _origin(site: FoundSite, side: int) -> Origin:
    """Walk back from a side's operand and collect every value whose positions it keeps."""
    start = _operand(site, side)
    if start is None:
        return Origin()
    found: set[ir.Value] = set()
    waiting = [start]
    while waiting:
        value = waiting.pop()
        if value in found or value.const_value is not None or value.is_initializer():
            continue
        node = value.producer()
        if node is not None and node.op_type in {"Constant", *_NO_DATA}:
            continue
        found.add(value)
        if node is not None:
            waiting.extend(_read(node))
    inputs = frozenset(str(value.name) for value in found if value.is_graph_input())
    return Origin(frozenset(found), inputs)


def _operand(site: FoundSite, side: int) -> ir.Value | None:
    match site.attention:
        case Scores(query=query, key=key) | Linear(query=query, key=key):
            return (query, key)[side].value
        case Probabilities(scores=(first, *_)) if len(first.inputs) > side:
            product = Contraction.of(first)
            return first.inputs[side] if product is None else product.operand(side)
    return None


def _read(node: ir.Node) -> list[ir.Value]:
    """Return the inputs of a node whose positions its outputs keep; none for a product of two activations."""
    inputs = [value for value in node.inputs if value is not None]
    if node.op_type in _ATTENTION:
        return []
    if node.op_type in _PRODUCTS and sum(not _is_constant(value) for value in inputs[:2]) > 1:
        return []
    if node.op_type == "QLinearMatMul" and not _is_constant(inputs[3]):
        return []
    return inputs[:1] if node.op_type in _FIRST_ALONE else inputs


def _is_constant(value: ir.Value) -> bool:
    """Whether a value is in the file, or a cast or transposition of such a value."""
    steps = 0
    while value.const_value is None and not value.is_initializer():
        node = value.producer()
        steps += 1
        if node is None or steps > 8:
            return False
        if node.op_type == "Constant":
            return True
        if node.op_type not in {"Transpose", "Cast", "Identity", "DequantizeLinear", "Reshape", "Unsqueeze"}:
            return False
        first = node.inputs[0]
        if first is None:
            return False
        value = first
    return True


def grids_of(signature: Signature, fixed: FixedAxes) -> dict[str, PatchGrid]:
    """Return the patch grid of every fixed axis that runs over the patches of an image.

    An image is an input of fixed height and width with 1, 3 or 4 channels. The convolution that cuts it gives the
    grid; without one, the size of square patches that fits the axis does.
    """
    images = {spec.name: size for spec in signature.inputs if (size := _image_size(spec)) is not None}
    grids: dict[str, PatchGrid] = {}
    for symbol, length in fixed.lengths.items():
        origin = fixed.origins[symbol]
        for name in sorted(origin.inputs & set(images)):
            cut = [shape for value in origin.values if (shape := _cut_by_convolution(value)) is not None]
            found = [
                PatchGrid(rows, columns, length - rows * columns)
                for rows, columns in (cut or list(_square_patches(*images[name])))
                if 0 <= length - rows * columns <= MOST_LEADING
            ]
            if found:
                grids[symbol] = min(found, key=lambda grid: grid.leading)
    return grids


def _image_size(spec: InputSpec) -> tuple[int, int] | None:
    """Return the height and width of an image, channels first or last; None for another input."""
    match spec.shape:
        case (int(channels), int(height), int(width)) if channels in _CHANNELS and min(height, width) > 4:
            return height, width
        case (int(height), int(width), int(channels)) if channels in _CHANNELS and min(height, width) > 4:
            return height, width
    return None


def _cut_by_convolution(value: ir.Value) -> tuple[int, int] | None:
    """Return the rows and columns of patches, if a convolution makes the value whose strides equal its kernel."""
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
