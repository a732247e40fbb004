"""A model of the zoo as a source of an export: seeded, traced, and asked for its weights by definition."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.finders.names import WRAPPER
from attnserve_server.conversion.sources.source_model import ZOO_PREFIX, Grid, Reference, ZooOptions
from attnserve_server.conversion.sources.torch_export import Traceable, quiet, trace
from attnserve_server.conversion.sources.zoo.cross_modal import IMAGE, PATCH, PATCHES
from attnserve_server.conversion.sources.zoo.registry import BUILDERS
from attnserve_server.conversion.sources.zoo.skeleton import (
    PADDING_ID,
    SIZES,
    VOCABULARY_SIZE,
    ZooAttention,
    ZooModule,
    ZooSize,
    draw_weights,
)
from attnserve_server.domain.values import Array

OUTPUTS = ("last_hidden_state", "embedding")
MAX_LENGTH = 8192
"""Positions have no end; this bounds what a server takes."""
_TRACE_LENGTHS = (11, 7, 4)
"""A tracer given a mask of ones would drop the mask, so two of the three sequences are padded."""


class Wrapper(nn.Module):
    """A model with its inputs by position, under an attribute whose name sites can leave out."""

    def __init__(self, module: ZooModule) -> None:
        super().__init__()
        setattr(self, WRAPPER, module)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs in the order of the model's own; outputs in the order of `OUTPUTS`."""
        outputs: tuple[Tensor, Tensor] = getattr(self, WRAPPER)(*inputs)
        return outputs


@dataclass(frozen=True, slots=True)
class ZooModel:
    """One model of the zoo. `sha256` is that of its weights, in the order of their names."""

    name: str
    architecture: str
    module: ZooModule
    sha256: str
    padding_id: int = PADDING_ID

    @property
    def pair_start(self) -> int | None:
        """A second text starts with its own first token."""
        return None

    @property
    def grids(self) -> Mapping[int, Grid]:
        """Of the images that the model looks at."""
        if "pixel_values" not in self.module.shapes:
            return {}
        return {PATCHES: Grid(rows=IMAGE // PATCH, columns=IMAGE // PATCH)}

    @property
    def tokenizer_path(self) -> Path | None:
        """The zoo's own: one token a byte, and words where spaces are."""
        return Path(__file__).with_name("tokenizer.json")

    @property
    def versions(self) -> Mapping[str, str]:
        """Of torch and onnx."""
        return {"torch": torch.__version__, "onnx": onnx.__version__}

    @property
    def vocabulary_sizes(self) -> Mapping[str, int]:
        """By the name of each input that holds ids."""
        return {name: VOCABULARY_SIZE for name in self.module.shapes if name.endswith("_ids")}

    @property
    def max_lengths(self) -> Mapping[str, int]:
        """By axis symbol."""
        return {axis: MAX_LENGTH for shape in self.module.shapes.values() for axis in shape if isinstance(axis, str)}

    def to_graph(self, exporter: str, opset: int) -> onnx.ModelProto:
        """Trace into a graph with dynamic batch and lengths. Raises BuildRefused where the exporter fails."""
        traceable = Traceable(
            module=Wrapper(self.module),
            inputs={name: _example(name, shape) for name, shape in self.module.shapes.items()},
            shapes=self.module.shapes,
            output_names=OUTPUTS,
            max_lengths=self.max_lengths,
        )
        return trace(traceable, exporter, opset)

    def reference(self, feeds: Mapping[str, Array]) -> Reference:
        """Outputs of the module, and the weights of each site by definition, in the order in which sites are run."""
        weights: list[Array | None] = []

        def note(attention: ZooAttention, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
            weights.extend(each.numpy() for each in attention.weights(*arguments))

        attentions = [module for module in self.module.modules() if isinstance(module, ZooAttention)]
        hooks = [attention.register_forward_pre_hook(note) for attention in attentions]
        try:
            with quiet(), torch.inference_mode():
                answer = self.module(*(torch.from_numpy(np.ascontiguousarray(feeds[n])) for n in self.module.shapes))
        finally:
            for hook in hooks:
                hook.remove()
        return Reference({name: each.numpy() for name, each in zip(OUTPUTS, answer, strict=True)}, weights)


def source_model(name: str, options: ZooOptions | None = None) -> ZooModel:
    """A seeded model of the zoo.

    Args:
        name: one of the zoo's; behind a `?` it may carry options, as the names of bundles' sources do:
            `linear?size=tiny&seed=7`.
        options: how large it is, and the seed of its weights; those behind the name go before them.

    Raises:
        BuildRefused: there is no such model, option or size, or the heads do not divide the width.
    """
    name, _, query = name.partition("?")
    options = _with(options or ZooOptions(), query)
    if name not in BUILDERS:
        lacks = f"the zoo has no {name!r}; it has" if name else f"{ZOO_PREFIX} without a name; the zoo has"
        raise BuildRefused(f"{lacks} {', '.join(sorted(BUILDERS))}")
    size = _size(options)
    try:
        module = BUILDERS[name](size).eval()
    except ValueError as fault:
        raise BuildRefused(f"zoo:{name} cannot be that large: {fault}") from None
    draw_weights(module, options.seed)
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.numpy().tobytes())
    return ZooModel(f"{ZOO_PREFIX}{name}{_query(options)}", type(module).__name__, module, digest.hexdigest())


def _with(options: ZooOptions, query: str) -> ZooOptions:
    """Options with those of a query in their place."""
    try:
        pairs = parse_qsl(query, strict_parsing=bool(query))
        given: dict[str, Any] = {key: value if key == "size" else int(value) for key, value in pairs}
        return replace(options, **given)
    except (TypeError, ValueError):
        known = ", ".join(each.name for each in fields(ZooOptions))
        raise BuildRefused(f"{query!r} are no options of the zoo; {known} are, as in size=tiny&seed=7") from None


def _query(options: ZooOptions) -> str:
    """The options that are not as they are by default, as a query; empty where all are."""
    given = {key: value for key, value in asdict(options).items() if value != getattr(ZooOptions(), key)}
    return f"?{urlencode(given)}" if given else ""


def _size(options: ZooOptions) -> ZooSize:
    if options.size not in SIZES:
        raise BuildRefused(f"size {options.size!r} is not known; {', '.join(SIZES)} are")
    named = SIZES[options.size]
    size = ZooSize(options.layers or named.layers, options.heads or named.heads, options.width or named.width)
    if size.width % size.heads or size.width % 2:
        raise BuildRefused(f"a width of {size.width} is not even, or no multiple of {size.heads} heads")
    return size


def _example(name: str, shape: tuple[str | int, ...]) -> Tensor:
    """Three rows, two of them padded: ids and masks agree."""
    longest = max(_TRACE_LENGTHS)
    extents = [longest if isinstance(extent, str) else extent for extent in shape]
    if name == "pixel_values":
        return torch.linspace(-1, 1, len(_TRACE_LENGTHS) * int(np.prod(extents))).reshape(-1, *extents)
    # Symbols that a tracer sees at one length it would take for one and the same.
    longest += 2 * (shape != ("seq",))
    mask = torch.zeros(len(_TRACE_LENGTHS), longest, dtype=torch.int64)
    for row, length in enumerate(_TRACE_LENGTHS):
        mask[row, :length] = 1
    if name.endswith("_mask"):
        return mask
    return (torch.arange(mask.numel()).reshape(mask.shape) % (VOCABULARY_SIZE - 1) + 1) * mask
