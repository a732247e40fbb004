"""Models of Hugging Face transformers as sources: loaded offline from a folder, traced, and asked eagerly."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.finders.names import WRAPPER
from attnserve_server.conversion.sources.architectures import Family, family_of
from attnserve_server.conversion.sources.source import ModelFolder, model_folder
from attnserve_server.conversion.sources.source_model import Grid, Reference
from attnserve_server.conversion.sources.torch_export import Traceable, quiet, trace
from attnserve_server.domain.values import Array

FUSED_FROM = 14
"""Below this opset torch's exporters do not know its fused attention, even to take it apart."""


class Wrapper(torch.nn.Module):
    """A source with tensors in and tensors out, under an attribute whose name sites can leave out."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        setattr(self, WRAPPER, family.source)
        self._family = family
        self._names = tuple(spec.name for spec in family.inputs)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Inputs in the order of the family's own; (B, ...) each."""
        tensors = dict(zip(self._names, inputs, strict=True))
        return self._family.outputs(self._family.call(tensors, weights=False), tensors)


class HuggingFaceModel:
    """A model folder as a source. Loads the model once for tracing, and once for its eager answers."""

    def __init__(self, folder: ModelFolder, pooling: str, *, normalize: bool) -> None:
        self._folder = folder
        self._pooling, self._normalize = pooling, normalize
        self._traced: Family = self._load("sdpa", "eager")
        self._eager: Family | None = None

    @property
    def name(self) -> str:
        """The folder's name, or that of its package."""
        return self._folder.name

    @property
    def sha256(self) -> str:
        """Of its model.safetensors."""
        return self._folder.sha256

    @property
    def architecture(self) -> str:
        """The class of the model."""
        return type(self._traced.source).__name__

    @property
    def vocabulary_sizes(self) -> Mapping[str, int]:
        """By the name of each input that holds ids."""
        return {spec.name: spec.vocabulary_size for spec in self._traced.inputs if spec.content == "ids"}

    @property
    def padding_id(self) -> int:
        """As the configuration has it."""
        return self._traced.padding_id

    @property
    def max_lengths(self) -> Mapping[str, int]:
        """The model's own, unless the tokenizer allows less: every dynamic axis holds text."""
        lengths = self._traced.max_lengths
        limit = self._folder.tokenizer_max_length()
        return {symbol: length if limit is None else min(length, limit) for symbol, length in lengths.items()}

    @property
    def tokenizer_path(self) -> Path | None:
        """The folder's own."""
        return self._folder.tokenizer_path

    @property
    def pair_start(self) -> int | None:
        """The token behind which a decoder's text starts."""
        return self._traced.pair_start

    @property
    def grids(self) -> Mapping[int, Grid]:
        """Patch grids by the length of their axis."""
        return self._traced.grids

    @property
    def versions(self) -> Mapping[str, str]:
        """Of torch, transformers and onnx."""
        import transformers  # noqa: PLC0415 - after the variable that `_load` sets

        return {"torch": torch.__version__, "transformers": transformers.__version__, "onnx": onnx.__version__}

    def to_graph(self, exporter: str, opset: int) -> onnx.ModelProto:
        """Trace into a graph with dynamic batch and lengths. Raises BuildRefused where the exporter fails."""
        family = self._traced
        traceable = Traceable(
            module=Wrapper(family),
            inputs=dict(zip((spec.name for spec in family.inputs), family.example(), strict=True)),
            shapes={spec.name: spec.shape for spec in family.inputs},
            output_names=family.output_names,
            max_lengths=family.max_lengths,
        )
        with family.tracing(), _stepwise(family.source) if opset < FUSED_FROM else contextlib.nullcontext():
            return trace(traceable, exporter, opset)

    def reference(self, feeds: Mapping[str, Array]) -> Reference:
        """Outputs and weights by the model's own eager attention."""
        if self._eager is None:
            self._eager = self._load("eager")
        family = self._eager
        tensors = {spec.name: torch.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in family.inputs}
        with quiet(), torch.inference_mode():
            answer = family.call(tensors, weights=True)
            outputs = family.outputs(answer, tensors)
            weights = family.weights(answer)
        return Reference(
            outputs={name: tensor.numpy() for name, tensor in zip(family.output_names, outputs, strict=True)},
            weights=[None if each is None else each.numpy() for each in weights],
        )

    def _load(self, *attentions: str) -> Family:
        """The model with the first implementation of attention that it supports."""
        faults: list[BuildRefused] = []
        for attention in attentions:
            try:
                source = _loaded(self._folder.path, attention)
            except BuildRefused as fault:
                faults.append(fault)
            else:
                return family_of(source, self._pooling, normalize=self._normalize)
        raise faults[-1]


def source_model(source: str, pooling: str, *, normalize: bool, expect_sha256: str, steps: Steps) -> HuggingFaceModel:
    """The model in a folder, or inside an installed package.

    Raises:
        BuildRefused: there is none, transformers cannot load it, or its weights are others.
    """
    folder = model_folder(source, expect_sha256)
    if pooling and folder.normalises() and not normalize:
        steps.warn("the source also scales its embedding to length 1; --normalize does the same")
    steps.begin("loading the model")
    model = HuggingFaceModel(folder, pooling, normalize=normalize)
    if folder.architecture() not in {"", model.architecture}:
        steps.warn(f"{folder.architecture()} is brought as {model.architecture}: its head and its scores are left out")
    return model


@contextlib.contextmanager
def _stepwise(source: Any) -> Iterator[None]:
    """While it lasts, the source computes attention step by step."""
    before = source.config._attn_implementation  # noqa: SLF001 - it has no public name
    source.set_attn_implementation("eager")
    try:
        yield
    finally:
        source.set_attn_implementation(before)


def _loaded(path: Path, attention: str) -> Any:
    """A model in evaluation mode, offline, in float32, with one implementation of attention."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers  # noqa: PLC0415 - reads the variable above when it is imported

    with quiet():
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            source = transformers.AutoModel.from_pretrained(
                path, attn_implementation=attention, dtype=torch.float32, local_files_only=True
            )
        except Exception as fault:  # noqa: BLE001 - the boundary to transformers, which raises many types here
            words = " ".join(str(fault).split()).replace(str(path), path.name) or type(fault).__name__
            raise BuildRefused(f"transformers cannot load the model: {words.partition('. ')[0]}") from None
    source.config.use_cache = False
    return source.eval()
