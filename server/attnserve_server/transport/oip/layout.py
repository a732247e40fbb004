"""One model in the terms of the Open Inference Protocol: datatypes, texts, lengths and outputs of attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from attnserve_server.model.manifest import NUMPY_DTYPES, Dimension, InputRole, InputSpec, Manifest, OutputSpec
from attnserve_server.transport.prepared import Reader
from attnserve_server.transport.wire import WIRE_DTYPES, WIRE_NUMPY

DATATYPES: Final[Mapping[str, str]] = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
}
"""The protocol's names of datatypes, by those of a manifest."""
BYTES: Final = "BYTES"
BF16: Final = "BF16"
KNOWN: Final = (*DATATYPES.values(), "UINT16", "UINT32", "UINT64", "INT16", BF16, BYTES)
BYTES_ONLY: Final = ("FP16", BF16)
"""Datatypes without typed contents and without a form in JSON."""
ROLLOUT: Final = "attention:rollout"
ATTENTION: Final = "attention:"
TOP_K: Final = "#top_k"
"""The dimension of links; no axis has this symbol."""
LINKS: Final = ("query", "key", "weight")
"""What outputs with `top_k` hold of each of the greatest weights."""
TIMINGS: Final = ("queue_ns", "compute_ns", "attention_ns", "encode_ns")
"""Parameters of an answer, in the order of `Timings`. They are integers, because clients of earlier releases of the
protocol have no parameters that are fractions."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input or output. `dims`: without the batch axis, a symbol where the length differs; `optional`: of inputs."""

    name: str
    datatype: str
    dims: tuple[Dimension, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Virtual:
    """An output of attention. `layer`: index of its site, -1 for rollout; `link`: one of `LINKS`; empty: the map."""

    layer: int
    link: str = ""


@dataclass(frozen=True, slots=True)
class Input:
    """An input as rows are read. `wire`: its dtype in the native contract."""

    spec: InputSpec
    datatype: str
    wire: int
    dtype: np.dtype[Any]
    mask: bool
    """Whether it hides the padding of a row, so that the row is cut."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One model. Immutable."""

    manifest: Manifest
    inputs: Mapping[str, Input]
    texts: Mapping[str, str]
    """The field of the native text input, by the name of each input of texts; empty without a tokenizer."""
    outputs: Mapping[str, OutputSpec]
    all_outputs: tuple[str, ...]
    """Those that a request gets if it names none; without lengths."""
    lengths: Mapping[str, str]
    """The axis whose lengths an output holds, by the output's name."""
    virtual: Mapping[str, Virtual]
    has_head: bool
    max_batch_size: int
    answered: tuple[str, ...]
    """The outputs of an answer to a request that names none: `all_outputs`, and lengths where these vary."""

    @classmethod
    def of(cls, reader: Reader) -> Layout:
        """Return the layout of a model, made at its first use."""
        found: Layout | None = reader.layouts.get("oip")
        if found is None:
            found = reader.layouts["oip"] = cls._made(reader)
        return found

    @classmethod
    def _made(cls, reader: Reader) -> Layout:
        intake = reader.intake
        manifest = intake.manifest
        cut = not intake.formulas
        inputs = {
            name: Input(
                spec,
                DATATYPES[spec.dtype],
                WIRE_DTYPES[spec.dtype],
                WIRE_NUMPY[spec.dtype],
                cut
                and spec.role is InputRole.ATTENTION_MASK
                and len(spec.shape) == 1
                and isinstance(spec.shape[0], str),
            )
            for name, spec in intake.inputs.items()
        }
        outputs = {spec.name: spec for spec in manifest.outputs}
        texts = {}
        if manifest.text is not None and intake.tokenizer is not None:
            texts = {_unused(field, intake.inputs): field for field in ("text", "text_pair")}
        lengths = _lengths(manifest, outputs)
        varies = any(isinstance(one, str) for name in intake.outputs for one in outputs[name].shape)
        return cls(
            manifest=manifest,
            inputs=inputs,
            texts=texts,
            outputs=outputs,
            all_outputs=intake.outputs,
            lengths=lengths,
            virtual=_virtual(manifest, outputs),
            has_head=manifest.head is not None,
            max_batch_size=intake.max_batch_size,
            answered=(*intake.outputs, *(lengths if varies else ())),
        )

    def tensors_in(self) -> list[Tensor]:
        """Return the inputs: the tensors, and then the texts that may replace some of them."""
        found = [Tensor(name, one.datatype, one.spec.shape, one.spec.optional) for name, one in self.inputs.items()]
        return found + [Tensor(name, BYTES, (1,), optional=True) for name in self.texts]

    def tensors_out(self, *, virtual: bool = True) -> list[Tensor]:
        """Return the outputs: the model's, lengths, and, unless `virtual` is false, those of attention."""
        found = [Tensor(one.name, DATATYPES[one.dtype], one.shape) for one in self.outputs.values()]
        found += [Tensor(name, "INT64", ()) for name in self.lengths]
        for name, one in self.virtual.items() if virtual else ():
            if one.link:
                found.append(Tensor(name, "FP32" if one.link == "weight" else "INT64", (TOP_K,)))
            else:
                site = self.manifest.sites[max(one.layer, 0)]
                heads = () if one.layer < 0 else (site.heads,)
                found.append(Tensor(name, "FP32", (*heads, site.query_axis, site.key_axis)))
        return found

    def fixed(self, dims: tuple[Dimension, ...]) -> list[int]:
        """Return a shape with -1 for each axis whose length differs."""
        fixed = {axis.symbol: axis.max_length for axis in self.manifest.axes if axis.fixed}
        return [one if isinstance(one, int) else fixed.get(one, -1) for one in dims]


def _unused(name: str, taken: Mapping[str, object]) -> str:
    while name in taken:
        name += "_"
    return name


def _lengths(manifest: Manifest, outputs: Mapping[str, OutputSpec]) -> dict[str, str]:
    """Name an output for each axis along which rows may have different lengths: `lengths` for the first of them.

    The first axis is that of text, or else the first one of the inputs. Lengths of derived axes follow from others.
    """
    open_ = {axis.symbol for axis in manifest.axes if not axis.fixed and axis.follows is None}
    axes = [one for spec in manifest.inputs for one in spec.shape if isinstance(one, str) and one in open_]
    if manifest.text is not None:
        axes = [manifest.text.axis, *axes]
    names = {"lengths" if at == 0 else f"lengths:{axis}": axis for at, axis in enumerate(dict.fromkeys(axes))}
    return {name: axis for name, axis in names.items() if name not in outputs}


def _virtual(manifest: Manifest, outputs: Mapping[str, OutputSpec]) -> dict[str, Virtual]:
    given = [layer for layer, site in enumerate(manifest.sites) if site.weights_output is not None]
    found = {f"{ATTENTION}{layer}": Virtual(layer) for layer in given}
    joined = {(site.query_axis, site.key_axis) for site in manifest.sites}
    within = all(site.kind != "cross" for site in manifest.sites) and len(joined) == 1 and len(set(*joined)) == 1
    if given and len(given) == len(manifest.sites) and within:
        found[ROLLOUT] = Virtual(-1)
    for name, virtual in list(found.items()):
        found |= {f"{name}:{link}": Virtual(virtual.layer, link) for link in LINKS}
    return {name: virtual for name, virtual in found.items() if name not in outputs}


def item_bytes(datatype: str) -> int:
    """Return the bytes of one element. Raise KeyError for a datatype without a fixed size."""
    return _ITEM_BYTES[datatype]


_ITEM_BYTES: Final = {name: NUMPY_DTYPES[ours].itemsize for ours, name in DATATYPES.items()} | {
    "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT16": 2, BF16: 2,
}  # fmt: skip
