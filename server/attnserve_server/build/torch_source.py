"""The torch side of an export: loading the source model, tracing it into a graph, and its eager answers.

The only module that imports torch and transformers.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from attnserve_server.build.errors import BuildRefused
from attnserve_server.build.names import WRAPPER
from attnserve_server.build.rotary import widen_rotary_caches
from attnserve_server.build.signature import SEQUENCE
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import BATCH

OPSET = 23
"""The first in which attention is one operator, so that the runtime's fused kernel and the taps both find it."""
HIDDEN, EMBEDDING = "last_hidden_state", "embedding"
_TRACE_LENGTHS = (11, 7, 4)
"""A tracer given a mask of ones would drop the mask, so two of the three sequences are padded."""


@dataclass(frozen=True, slots=True)
class TorchModel:
    """A loaded source, in evaluation mode."""

    wrapper: Pooled
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    vocabulary_size: int
    padding_id: int
    max_length: int
    architecture: str
    versions: dict[str, str] = field(default_factory=dict)


class Pooled(torch.nn.Module):
    """A source model with tensors in and tensors out: hidden states (B, L, D) and, if pooled, (B, D)."""

    def __init__(self, source: torch.nn.Module, names: tuple[str, ...], pooling: str, *, normalize: bool) -> None:
        super().__init__()
        setattr(self, WRAPPER, source)
        self._names, self._pooling, self._normalize = names, pooling, normalize

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Inputs in the order of the names; all (B, L), int64."""
        return self.outputs(getattr(self, WRAPPER)(**dict(zip(self._names, inputs, strict=True))), inputs)

    def outputs(self, answer: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The outputs from the source's own answer."""
        hidden = answer.last_hidden_state
        if not self._pooling:
            return (hidden,)
        mask = inputs[self._names.index("attention_mask")].unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        if self._normalize:
            pooled = torch.nn.functional.normalize(pooled, dim=-1)
        return hidden, pooled

    def eager(self, *inputs: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Outputs, and each site's weights (B, H, L, S), as the source's own eager attention has them."""
        feeds = dict(zip(self._names, inputs, strict=True))
        answer = getattr(self, WRAPPER)(**feeds, output_attentions=True)
        return self.outputs(answer, inputs), tuple(answer.attentions)


def load(path: Path, attention: str, pooling: str, *, normalize: bool) -> TorchModel:
    """Load a model folder, offline, with the given implementation of attention (`sdpa` or `eager`).

    Raises:
        BuildRefused: transformers cannot load it.
    """
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
    config = source.config
    names = _input_names(source)
    # The wrapper too: a wrapper left in training mode would put the source back into it, and dropout with it.
    wrapper = Pooled(source, names, pooling, normalize=normalize).eval()
    return TorchModel(
        wrapper,
        input_names=names,
        output_names=(HIDDEN, EMBEDDING) if pooling else (HIDDEN,),
        vocabulary_size=int(source.get_input_embeddings().num_embeddings),
        padding_id=int(getattr(config, "pad_token_id", None) or 0),
        max_length=_max_length(source),
        architecture=type(source).__name__,
        versions={"torch": torch.__version__, "transformers": transformers.__version__, "onnx": onnx.__version__},
    )


def to_graph(model: TorchModel) -> onnx.ModelProto:
    """Trace into a graph with dynamic batch and length. Raises BuildRefused where the exporter fails."""
    batch, length = torch.export.Dim(BATCH, min=1), torch.export.Dim(SEQUENCE, min=1, max=model.max_length)
    example = _example(model)
    with quiet():
        try:
            program = torch.onnx.export(
                model.wrapper,
                example,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(model.input_names),
                output_names=[f"{WRAPPER}.{name}" for name in model.output_names],
                # One entry for `*inputs`, which holds a shape for each of them.
                dynamic_shapes=(tuple({0: batch, 1: length} for _ in example),),
                verbose=False,
            )
        except Exception as fault:  # noqa: BLE001 - the boundary to torch's exporter, which raises many types
            lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
            first = lines[0] if lines else type(fault).__name__
            raise BuildRefused(f"torch cannot export the model: {first[:300]}") from None
    assert program is not None
    _name_outputs(program.model.graph, model.output_names)
    widen_rotary_caches(program.model.graph)
    return program.model_proto


def _name_outputs(graph: ir.Graph, names: tuple[str, ...]) -> None:
    """Give the outputs their names; the exporter calls inner values `embedding` too, and would let both stand."""
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.name in names:
                value.name = f"{value.name}.inner"
    for output, name in zip(graph.outputs, names, strict=True):
        output.name = name


def eager_answers(model: TorchModel, feeds: Mapping[str, Array]) -> tuple[dict[str, Array], list[Array]]:
    """Outputs by name and each site's weights (B, H, L, S) for one batch. The model is loaded with `eager`."""
    inputs = tuple(torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in model.input_names)
    with quiet(), torch.inference_mode():
        outputs, attentions = model.wrapper.eager(*inputs)
    named = zip(model.output_names, outputs, strict=True)
    return {name: output.numpy() for name, output in named}, [weights.numpy() for weights in attentions]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' own warnings and notes away from the person: none of them can be acted on."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _example(model: TorchModel) -> tuple[torch.Tensor, ...]:
    rows, longest = len(_TRACE_LENGTHS), max(_TRACE_LENGTHS)
    mask = torch.zeros(rows, longest, dtype=torch.int64)
    for row, length in enumerate(_TRACE_LENGTHS):
        mask[row, :length] = 1
    ids = (torch.arange(rows * longest).reshape(rows, longest) % (model.vocabulary_size - 1) + 1) * mask
    known = {"input_ids": ids, "attention_mask": mask}
    return tuple(known.get(name, torch.zeros_like(ids)) for name in model.input_names)


def _input_names(source: Any) -> tuple[str, ...]:
    accepted = inspect.signature(source.forward).parameters
    for name in ("input_ids", "attention_mask"):
        if name not in accepted:
            raise BuildRefused(f"{type(source).__name__} takes no {name}: only text encoders and decoders are exported")
    if getattr(source.config, "is_encoder_decoder", False):
        raise BuildRefused(f"{type(source).__name__} is an encoder with a decoder, which cannot be exported yet")
    # Models with one type of token accept the input and have no use for it.
    types = "token_type_ids" in accepted and getattr(source.config, "type_vocab_size", 0) > 1
    return ("input_ids", "attention_mask", *(("token_type_ids",) if types else ()))


def _max_length(source: Any) -> int:
    """Positions that the model has embeddings for; RoBERTa and its kin count them from behind their padding's id."""
    declared = getattr(source.config, "max_position_embeddings", None)
    for name, module in source.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    return int(declared) if declared else 512
