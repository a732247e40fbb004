"""Build a seeded model of the zoo by its name, trace it to ONNX, and answer with its weights by definition.

The zoo is a set of models that are generated from a seed. `zoo_model` raises BuildRefused for an unknown name,
size or option.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.finders.names import WRAPPER
from attnserve_server.conversion.learning.fixed_axes import PatchGrid
from attnserve_server.conversion.sources.source import ZOO_PREFIX, Task, ZooOptions
from attnserve_server.conversion.sources.torch_export import Traceable, quiet, trace
from attnserve_server.conversion.sources.zoo.compressed import LinearAttention, MultiScaleAttention
from attnserve_server.conversion.sources.zoo.cross import (
    IMAGE,
    PATCH,
    PATCHES,
    CrossModalEncoder,
    EncoderDecoder,
)
from attnserve_server.conversion.sources.zoo.dense import CausalAttention, DenseAttention
from attnserve_server.conversion.sources.zoo.skeleton import (
    PADDING_ID,
    SIZES,
    VOCABULARY_SIZE,
    Encoder,
    ZooAttention,
    ZooModule,
    ZooSize,
    draw_weights,
)
from attnserve_server.conversion.sources.zoo.sparse import SlidingWindowAttention, TopKAttention
from attnserve_server.conversion.verify.compare import Reference
from attnserve_server.domain.values import Array

BUILDERS: dict[str, Callable[[ZooSize], ZooModule]] = {
    "self": partial(Encoder, attention=DenseAttention),
    "causal": partial(Encoder, attention=CausalAttention),
    "cross": EncoderDecoder,
    "sliding-window": partial(Encoder, attention=SlidingWindowAttention),
    "top-k": partial(Encoder, attention=TopKAttention),
    "linear": partial(Encoder, attention=LinearAttention),
    "multi-scale": partial(Encoder, attention=MultiScaleAttention),
    "cross-modal": CrossModalEncoder,
}
"""The models of the zoo by name."""
OUTPUTS = ("last_hidden_state", "embedding")
MAX_LENGTH = 8192
"""Greatest length that a server accepts. The positions themselves have no limit."""
_TRACE_LENGTHS = (11, 7, 4)
"""Two of the three traced sequences are padded, because a tracer removes a mask of ones."""


class Wrapper(nn.Module):
    """A model with inputs by position, under an attribute that site names leave out."""

    def __init__(self, module: ZooModule) -> None:
        super().__init__()
        setattr(self, WRAPPER, module)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs in the order of `OUTPUTS`; inputs are in the order of the model's own."""
        outputs: tuple[Tensor, Tensor] = getattr(self, WRAPPER)(*inputs)
        return outputs


@dataclass(frozen=True, slots=True)
class ZooModel:
    """One model of the zoo, a `TorchModel`. `sha256` is the digest of its weights in the order of their names."""

    name: str
    architecture: str
    module: ZooModule
    sha256: str
    padding_id: int = PADDING_ID

    @property
    def pair_start(self) -> int | None:
        """None: a second text starts with its own first token."""
        return None

    @property
    def task(self) -> Task:
        """Empty: models of the zoo have no head, and their embedding is part of the module."""
        return Task()

    @property
    def grids(self) -> Mapping[int, PatchGrid]:
        """The patch grid of the model's image input, by the number of patches."""
        if "pixel_values" not in self.module.shapes:
            return {}
        return {PATCHES: PatchGrid(rows=IMAGE // PATCH, columns=IMAGE // PATCH)}

    @property
    def tokenizer_path(self) -> Path | None:
        """The zoo's tokenizer: one token for each byte, words split at spaces."""
        return Path(__file__).with_name("tokenizer.json")

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of torch and onnx."""
        return {"torch": torch.__version__, "onnx": onnx.__version__}

    @property
    def vocabulary_sizes(self) -> Mapping[str, int]:
        """The vocabulary size of each input of ids, by name."""
        return {name: VOCABULARY_SIZE for name in self.module.shapes if name.endswith("_ids")}

    @property
    def max_lengths(self) -> Mapping[str, int]:
        """`MAX_LENGTH` for each axis symbol."""
        return {axis: MAX_LENGTH for shape in self.module.shapes.values() for axis in shape if isinstance(axis, str)}

    def to_graph(self, exporter: str, opset: int) -> onnx.ModelProto:
        """Trace to a graph with dynamic batch and lengths. Raises BuildRefused if the exporter fails."""
        traceable = Traceable(
            module=Wrapper(self.module),
            inputs={name: _example(name, shape) for name, shape in self.module.shapes.items()},
            shapes=self.module.shapes,
            output_names=OUTPUTS,
            max_lengths=self.max_lengths,
        )
        return trace(traceable, exporter, opset)

    def reference(self, feeds: Mapping[str, Array]) -> Reference:
        """Return the module's outputs, and each site's weights by definition, in the order in which sites run."""
        weights: list[Array | None] = []

        def collect(attention: ZooAttention, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
            weights.extend(each.numpy() for each in attention.weights(*arguments))

        attentions = [module for module in self.module.modules() if isinstance(module, ZooAttention)]
        hooks = [attention.register_forward_pre_hook(collect) for attention in attentions]
        try:
            with quiet(), torch.inference_mode():
                answer = self.module(*(torch.from_numpy(np.ascontiguousarray(feeds[n])) for n in self.module.shapes))
        finally:
            for hook in hooks:
                hook.remove()
        return Reference({name: each.numpy() for name, each in zip(OUTPUTS, answer, strict=True)}, weights)


def zoo_model(name: str, options: ZooOptions | None = None) -> ZooModel:
    """Build a seeded model of the zoo.

    Args:
        name: a key of `BUILDERS`, optionally with options in the form that provenance records:
            `linear?size=tiny&seed=7`.
        options: size and seed. Options in `name` override them.

    Raises:
        BuildRefused: the name, an option or the size is unknown, or the width is not a multiple of the heads.
    """
    name, _, query = name.partition("?")
    options = _with(options or ZooOptions(), query)
    if name not in BUILDERS:
        problem = f"the zoo has no model {name!r}" if name else f"{ZOO_PREFIX} lacks the name of a model"
        raise BuildRefused(f"{problem}; it has {', '.join(sorted(BUILDERS))}")
    size = _size(options)
    try:
        module = BUILDERS[name](size).eval()
    except ValueError as fault:
        raise BuildRefused(f"zoo:{name} does not support this size: {fault}") from None
    draw_weights(module, options.seed)
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.numpy().tobytes())
    return ZooModel(f"{ZOO_PREFIX}{name}{_query(options)}", type(module).__name__, module, digest.hexdigest())


def _with(options: ZooOptions, query: str) -> ZooOptions:
    """Return the options, overridden by those of a query."""
    try:
        pairs = parse_qsl(query, strict_parsing=bool(query))
        given: dict[str, Any] = {key: value if key == "size" else int(value) for key, value in pairs}
        return replace(options, **given)
    except (TypeError, ValueError):
        known = ", ".join(each.name for each in fields(ZooOptions))
        raise BuildRefused(f"{query!r} are not options of the zoo; use {known}, as in size=tiny&seed=7") from None


def _query(options: ZooOptions) -> str:
    """Return the options that differ from their defaults as a query; empty if none does."""
    given = {key: value for key, value in asdict(options).items() if value != getattr(ZooOptions(), key)}
    return f"?{urlencode(given)}" if given else ""


def _size(options: ZooOptions) -> ZooSize:
    if options.size not in SIZES:
        raise BuildRefused(f"size {options.size!r} is unknown; use one of {', '.join(SIZES)}")
    named = SIZES[options.size]
    size = ZooSize(options.layers or named.layers, options.heads or named.heads, options.width or named.width)
    if size.width % size.heads or size.width % 2:
        raise BuildRefused(f"width {size.width} must be even and a multiple of the {size.heads} heads")
    return size


def _example(name: str, shape: tuple[str | int, ...]) -> Tensor:
    """Return three rows of one input, two of them padded; ids and masks agree."""
    longest = max(_TRACE_LENGTHS)
    sizes = [longest if isinstance(axis, str) else axis for axis in shape]
    if name == "pixel_values":
        return torch.linspace(-1, 1, len(_TRACE_LENGTHS) * int(np.prod(sizes))).reshape(-1, *sizes)
    # A tracer unifies symbols that have equal lengths in the example.
    longest += 2 * (shape != ("seq",))
    mask = torch.zeros(len(_TRACE_LENGTHS), longest, dtype=torch.int64)
    for row, length in enumerate(_TRACE_LENGTHS):
        mask[row, :length] = 1
    if name.endswith("_mask"):
        return mask
    return (torch.arange(mask.numel()).reshape(mask.shape) % (VOCABULARY_SIZE - 1) + 1) * mask
