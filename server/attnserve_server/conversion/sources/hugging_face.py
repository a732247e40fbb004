"""Hugging Face models as sources: loaded offline from a folder or an installed package, traced, and run eagerly."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.finders.names import WRAPPER
from attnserve_server.conversion.learning.fixed_axes import PatchGrid
from attnserve_server.conversion.sources.architectures import Family, Head, family_of, head_of, keeps_head
from attnserve_server.conversion.sources.architectures.base import eager
from attnserve_server.conversion.sources.architectures.heads import spec_of
from attnserve_server.conversion.sources.architectures.text import HIDDEN
from attnserve_server.conversion.sources.model_folder import ModelFolder, model_folder
from attnserve_server.conversion.sources.sentence_transformers import (
    Modules,
    activation_of,
    modules_of,
    prompts_of,
    sizes_of,
)
from attnserve_server.conversion.sources.source import Task
from attnserve_server.conversion.sources.torch_export import Traceable, quiet, trace
from attnserve_server.conversion.verify.compare import Reference
from attnserve_server.domain.values import Array
from attnserve_server.model.heads import EmbeddingSpec

FUSED_FROM = 14
"""The lowest opset in which torch's exporters support its fused attention, as one operator or decomposed."""


class Wrapper(torch.nn.Module):
    """A model with tensors as inputs and outputs, under an attribute that site names leave out."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        setattr(self, WRAPPER, family.source)
        self._family = family
        self._names = tuple(spec.name for spec in family.inputs)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs, (B, ...) each; inputs are in the order of the family's inputs."""
        tensors = dict(zip(self._names, inputs, strict=True))
        return self._family.outputs(self._family.call(tensors, weights=False), tensors)


class HuggingFaceModel:
    """A model folder as a `TorchModel`. Loads the model once for tracing, and once for its eager answers."""

    def __init__(self, folder: ModelFolder, modules: Modules | None = None, *, keep_head: bool = True) -> None:
        self._folder, self._modules = folder, modules
        # The transformer of an embedding model may be saved with a head of its training, which is not used.
        unused = modules is not None and modules.own
        self._head = head_of(folder.architecture()) if keep_head and not unused else None
        self._traced: Family = self._load("sdpa", "eager")
        self.task = self._task()
        """What its task adds to hidden states."""
        self._eager: Family | None = None

    @property
    def name(self) -> str:
        """The name of the folder or of its package."""
        return self._folder.name

    @property
    def sha256(self) -> str:
        """Digest of its model.safetensors."""
        return self._folder.sha256

    @property
    def architecture(self) -> str:
        """Name of its class."""
        return type(self._traced.source).__name__

    @property
    def vocabulary_sizes(self) -> Mapping[str, int]:
        """The vocabulary size of each input of ids, by name."""
        return {spec.name: spec.vocabulary_size for spec in self._traced.inputs if spec.content == "ids"}

    @property
    def padding_id(self) -> int:
        """The padding id of the configuration."""
        return self._traced.padding_id

    @property
    def max_lengths(self) -> Mapping[str, int]:
        """The greatest lengths of the model, or of the tokenizer if those are less: every dynamic axis holds text."""
        lengths = self._traced.max_lengths
        limit = self._folder.tokenizer_max_length(embeds=self._modules is not None and self._modules.own)
        return {symbol: length if limit is None else min(length, limit) for symbol, length in lengths.items()}

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer.json of the folder."""
        return self._folder.tokenizer_path

    @property
    def pair_start(self) -> int | None:
        """The id before the text of a decoder."""
        return self._traced.pair_start

    @property
    def grids(self) -> Mapping[int, PatchGrid]:
        """Patch grids by the length of their axis."""
        return self._traced.grids

    def _embedding(self, similarity: str = "", sizes: tuple[int, ...] = ()) -> EmbeddingSpec | None:
        made = self._modules
        if made is None:
            return None
        return EmbeddingSpec(
            pooling=str(made), own=made.own, similarity=similarity, normalized=made.normalized, sizes=sizes
        )

    def _task(self) -> Task:
        """Return its head, embedding and prompts, as its files state them.

        Hidden states beside a head or an embedding, and scores over the vocabulary, are large: they are returned on
        request.
        """
        type_ids = self._folder.gives_type_ids()
        if self._head is not None:
            masked = self._head.kind == "masked_tokens"
            mask_token, mask_id = self._folder.mask_token() if masked else ("", None)
            head = spec_of(self._head, self._traced.source.config, mask_id, activation_of(self._folder.path))
            return Task(
                head=head,
                embedding=self._embedding(),
                on_request=frozenset({HIDDEN, *(self._head.outputs if masked else ())}),
                mask_token="" if mask_id is None else mask_token,
                type_ids=type_ids,
            )
        if self._modules is None:
            return Task(type_ids=type_ids)
        if not self._modules.own:
            return Task(embedding=self._embedding(), type_ids=type_ids)
        prompts = prompts_of(self._folder.path)
        return Task(
            embedding=self._embedding(prompts.similarity, sizes_of(self._folder.path)),
            on_request=frozenset({HIDDEN}),
            prompts=prompts.texts,
            default_prompt=prompts.default,
            type_ids=type_ids,
        )

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of torch, transformers and onnx."""
        import transformers  # noqa: PLC0415 - after the variable that `_loaded` sets

        return {"torch": torch.__version__, "transformers": transformers.__version__, "onnx": onnx.__version__}

    def to_graph(self, exporter: str, opset: int) -> onnx.ModelProto:
        """Trace to a graph with dynamic batch and lengths. Raises BuildRefused if the exporter fails."""
        family = self._traced
        traceable = Traceable(
            module=Wrapper(family),
            inputs=dict(zip((spec.name for spec in family.inputs), family.example(), strict=True)),
            shapes={spec.name: spec.shape for spec in family.inputs},
            output_names=family.output_names,
            max_lengths=family.max_lengths,
        )
        with family.tracing(), eager(family.source) if opset < FUSED_FROM else contextlib.nullcontext():
            try:
                return trace(traceable, exporter, opset)
            except BuildRefused as fault:
                if self._head is None:
                    raise
                raise BuildRefused(f"{fault}; --no-head exports the model without its head") from None

    def reference(self, feeds: Mapping[str, Array]) -> Reference:
        """Return outputs and weights of the model's own eager attention.

        Exceptions of torch pass through. `feeds` must have every input of the model, or KeyError is raised.
        """
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
        """Load the model with the first of these attention implementations that it supports.

        A head is left out if the weights of the head are missing, or the family of the model serves none.
        """
        faults: list[BuildRefused] = []
        for head in dict.fromkeys((self._head, None)):
            for attention in attentions:
                try:
                    source, complete = _loaded(self._folder.path, attention, head)
                except BuildRefused as fault:
                    faults.append(fault)
                    continue
                if head is not None and not (complete and keeps_head(source, head)):
                    break
                self._head = head
                return family_of(source, self._modules, head)
        raise faults[-1]


def hugging_face_model(
    source: str, pooling: str, *, normalize: bool, expect_sha256: str, keep_head: bool, steps: Steps
) -> HuggingFaceModel:
    """Load the model of a folder, or of an installed package.

    Args:
        source: a folder, or `package:NAME`.
        pooling: "mean" adds the output `embedding`; empty: only if the folder is one of sentence-transformers.
        normalize: whether to scale that mean to length 1.
        expect_sha256: the required digest of its model.safetensors; empty: any.
        keep_head: whether to keep a head that can be labelled, and the modules of sentence-transformers.
        steps: receives warnings.

    Raises:
        BuildRefused: there is no model, transformers cannot load it, or its weights have another digest.
    """
    folder = model_folder(source, expect_sha256)
    modules = modules_of(folder.path) if keep_head and not pooling else None
    if pooling:
        modules = Modules((pooling,), (None,) if normalize else ())
        with contextlib.suppress(BuildRefused):  # a module that is not supported: it is not exported
            own = modules_of(folder.path)
            if own is not None and str(own) != str(modules):
                steps.warn(f"the source's own embedding is {own}; leave out --pooling and --normalize to export it")
    steps.note("loading the model")
    model = HuggingFaceModel(folder, modules, keep_head=keep_head)
    embeds = modules is not None and modules.own
    wanted = (keep_head and not embeds) or head_of(folder.architecture()) is None
    if wanted and folder.architecture() not in {"", model.architecture}:
        steps.warn(
            f"{folder.architecture()} is converted as {model.architecture}: without its head, and without the head's "
            "scores"
        )
    return model


def _loaded(path: Path, attention: str, head: Head | None) -> tuple[Any, bool]:
    """Load a model offline, in float32 and evaluation mode, with one implementation of attention.

    Returns:
        The model, and whether the folder has all of its weights: transformers draws missing ones at random.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers  # noqa: PLC0415 - reads the variable above when it is imported

    with quiet():
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            loader = transformers.AutoModel if head is None else getattr(transformers, head.loader)
            source, report = loader.from_pretrained(
                path,
                attn_implementation=attention,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as fault:  # noqa: BLE001 - the boundary to transformers, which raises many types here
            words = " ".join(str(fault).split()).replace(str(path), path.name) or type(fault).__name__
            raise BuildRefused(f"transformers cannot load the model: {words.partition('. ')[0]}") from None
    source.config.use_cache = False
    return source.eval(), not report["missing_keys"]
