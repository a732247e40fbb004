"""Makes files with optimum-onnx: plain exports, its optimization levels, its dynamic int8, and decoders with a cache.

`python optimum_files.py FOLDER` writes a case for each model and tool, in an environment with optimum-onnx and torch. A
case is the file, its inputs and, where the tool does not round, the answers and attention weights in torch;
`bench.foreign` serves and compares them. A tool that fails makes a case without a file, which states the error. A case
that FOLDER already has raises FileExistsError.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from cases import Cases, cases_of_command_line, quiet
from models import SPREAD, VOCABULARY, Answer, Arrays, answers_of, texts, word_tokenizer
from transformers.modeling_outputs import BaseModelOutput

os.environ["HF_HUB_OFFLINE"] = "1"
PACKAGE = "optimum-onnx"
FRAMES = 12
_SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
_NARROW = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, **SPREAD
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A checkpoint with random weights.

    Attributes:
        name: for the table.
        module: the model, in evaluation mode and eager attention.
        sequences: inputs of each sequence by name.
        output: name of the output that is compared.
        answer: returns output and weights of the module for a batch of one sequence.
        words: whether it has a tokenizer.
    """

    name: str
    module: Any
    sequences: tuple[Arrays, ...]
    output: str
    answer: Callable[[Any, Mapping[str, torch.Tensor]], Answer]
    words: bool = False

    def saved(self, folder: Path) -> Path:
        """Write the checkpoint."""
        with quiet():
            self.module.save_pretrained(folder)
            if self.words:
                word_tokenizer().save_pretrained(folder)
        return folder

    def answers(self) -> tuple[list[Arrays], list[Arrays]]:
        """Return output and weights, (H, L, S) by layer, of each sequence alone."""
        return answers_of(self.sequences, self.output, partial(self.answer, self.module))


def _plain(module: Any, batch: Mapping[str, torch.Tensor]) -> Answer:
    found = module(**batch, output_attentions=True)
    return found[0], found.attentions


def _generating(module: Any, batch: Mapping[str, torch.Tensor]) -> Answer:
    found = module(**batch, output_attentions=True, use_cache=False)
    return found.logits, found.attentions


def _decoding(module: Any, batch: Mapping[str, torch.Tensor]) -> Answer:
    """Run a decoder over given states of its encoder. Self and cross attention alternate."""
    mask = batch.get("encoder_attention_mask")
    found = module(
        decoder_input_ids=batch["input_ids"],
        encoder_outputs=BaseModelOutput(batch["encoder_hidden_states"]),
        **({} if mask is None else {"attention_mask": mask}),
        output_attentions=True,
        use_cache=False,
    )
    pairs = zip(found.decoder_attentions, found.cross_attentions, strict=True)
    return found.logits, [each for pair in pairs for each in pair]


def _model(auto: str, config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return getattr(transformers, auto).from_config(config, attn_implementation="eager").eval()


def _crossed(width: int, *, masked: bool = True) -> tuple[Arrays, ...]:
    """Return decoder ids, and states of an encoder of another length."""
    random = np.random.default_rng(5)
    rows = []
    for row in texts(masked=False):
        states = random.normal(size=(FRAMES, width)).astype(np.float32)
        mask = {"encoder_attention_mask": np.ones(FRAMES, np.int64)} if masked else {}
        rows.append({**row, "encoder_hidden_states": states, **mask})
    return tuple(rows)


def _images(size: int) -> tuple[Arrays, ...]:
    random = np.random.default_rng(6)
    return tuple({"pixel_values": random.normal(size=(3, size, size)).astype(np.float32)} for _ in range(3))


def encoders() -> list[Source]:
    """Return encoders of text."""
    bert = transformers.BertConfig(**_SMALL, **_NARROW, max_position_embeddings=40)
    roberta = transformers.RobertaConfig(**{**_SMALL, "pad_token_id": 1}, **_NARROW, max_position_embeddings=64)
    distil = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=40, **SPREAD
    )
    return [
        Source(name, _model("AutoModel", config, seed), texts(), "last_hidden_state", _plain)
        for seed, (name, config) in enumerate((("BERT", bert), ("RoBERTa", roberta), ("DistilBERT", distil)))
    ]


def decoders() -> list[Source]:
    """Return decoders, whose files have a cache."""
    gpt2 = transformers.GPT2Config(**_SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPREAD)
    rotary = {**_SMALL, **_NARROW, "num_key_value_heads": 2, "max_position_embeddings": 64}
    configs = {
        "GPT-2": gpt2,
        "Llama": transformers.LlamaConfig(**rotary),
        "Qwen2": transformers.Qwen2Config(**rotary),
        "BLOOM": transformers.BloomConfig(**_SMALL, hidden_size=32, n_layer=2, n_head=4, **SPREAD),
        "OPT": transformers.OPTConfig(
            **_SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
            max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.3,
        ),
    }  # fmt: skip
    return [
        Source(name, _model("AutoModelForCausalLM", config, seed), texts(), "logits", _generating, words=True)
        for seed, (name, config) in enumerate(configs.items(), start=10)
    ]


def crossing() -> list[Source]:
    """Return encoder-decoders, by their decoders."""
    t5 = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    bart = transformers.BartConfig(
        **{**_SMALL, "pad_token_id": 1}, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, init_std=0.3,
    )  # fmt: skip
    return [
        Source("T5 decoder", _model("AutoModelForSeq2SeqLM", t5, 20), _crossed(32), "logits", _decoding, words=True),
        Source(
            "BART decoder", _model("AutoModelForSeq2SeqLM", bart, 21), _crossed(32), "logits", _decoding, words=True
        ),
    ]


def images() -> list[Source]:
    """Return encoders of images."""
    square = {**_NARROW, "image_size": 16, "patch_size": 4}
    return [
        Source(
            "ViT", _model("AutoModel", transformers.ViTConfig(**square), 30), _images(16), "last_hidden_state", _plain
        ),
        Source(
            "DeiT", _model("AutoModel", transformers.DeiTConfig(**square), 31), _images(16), "last_hidden_state", _plain
        ),
    ]


class Maker:
    """Makes the files of one source."""

    def __init__(self, cases: Cases, source: Source, work: Path) -> None:
        self._cases, self._source = cases, source
        self._checkpoint = source.saved(work / "".join(source.name.split()))
        self._outputs, self._weights = source.answers()

    def exported(self, place: Path, task: str) -> Path:
        """Export the checkpoint for a task, and return the folder."""
        from optimum.exporters.onnx import main_export

        with quiet():
            main_export(str(self._checkpoint), output=place, task=task, do_validation=False, no_post_process=False)
        return place

    def add(self, tool: str, write: Callable[[Path], Path], *, exact: bool = True, note: str = "") -> None:
        """Write one case. `exact`: whether its answers must be the source's; False: those of the file itself."""
        self._cases.add(
            tool,
            PACKAGE,
            self._source.name,
            write,
            self._source.sequences,
            outputs=self._outputs if exact else (),
            weights=self._weights if exact else (),
            sites=len(self._weights[0]),
            note=note,
            words=self._source.words,
        )


def optimized(level: str) -> Callable[[Path], Path]:
    """Return a function that optimizes the export in a folder at a level, O1 to O3."""

    def write(place: Path) -> Path:
        from optimum.onnxruntime import AutoOptimizationConfig, ORTOptimizer

        with quiet():
            optimizer = ORTOptimizer.from_pretrained(place)
            optimizer.optimize(save_dir=place / level, optimization_config=getattr(AutoOptimizationConfig, level)())
        return next((place / level).glob("*.onnx"))

    return write


def quantized(place: Path, name: str) -> Path:
    """Quantize a file of a folder dynamically, for AVX2."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    with quiet():
        quantizer = ORTQuantizer.from_pretrained(place, file_name=name)
        quantizer.quantize(
            save_dir=place / "int8",
            quantization_config=AutoQuantizationConfig.avx2(is_static=False, per_channel=False),
        )
    for beside in place.glob("tokenizer*"):
        shutil.copy(beside, place / "int8")
    return next((place / "int8").glob("*.onnx"))


def make(cases: Cases, work: Path) -> None:
    """Write every case."""
    for source in encoders():
        maker = Maker(cases, source, work)
        maker.add("optimum", lambda place, m=maker: m.exported(place, "feature-extraction") / "model.onnx")
        if source.name != "BERT":
            continue
        for level in ("O1", "O2", "O3"):
            maker.add(
                f"optimum {level}",
                lambda place, m=maker, o=level: optimized(o)(m.exported(place, "feature-extraction")),
                exact=level != "O3",  # it approximates Gelu by tanh
            )
        maker.add(
            "optimum dynamic int8",
            lambda place, m=maker: quantized(m.exported(place, "feature-extraction"), "model.onnx"),
            exact=False,
        )
    for source in decoders():
        maker, task = Maker(cases, source, work), "text-generation-with-past"
        maker.add("optimum with past", lambda place, m=maker, t=task: m.exported(place, t) / "model.onnx")
        if source.name in {"GPT-2", "Llama"}:
            maker.add(
                "optimum with past, dynamic int8",
                lambda place, m=maker, t=task: quantized(m.exported(place, t), "model.onnx"),
                exact=False,
            )
            maker.add(
                "optimum without past", lambda place, m=maker: m.exported(place, "text-generation") / "model.onnx"
            )
    for source in crossing():
        maker, task = Maker(cases, source, work), "text2text-generation-with-past"
        maker.add("optimum, first step", lambda place, m=maker, t=task: m.exported(place, t) / "decoder_model.onnx")
        merged = "decoder_model_merged.onnx"
        maker.add("optimum merged", lambda place, m=maker, t=task, f=merged: m.exported(place, t) / f)
        maker.add(
            "optimum merged, dynamic int8",
            lambda place, m=maker, t=task, f=merged: quantized(m.exported(place, t), f),
            exact=False,
        )
    for source in images():
        maker = Maker(cases, source, work)
        maker.add("optimum", lambda place, m=maker: m.exported(place, "feature-extraction") / "model.onnx")


def main() -> None:
    """Entry point."""
    import tempfile

    cases = cases_of_command_line(__doc__)
    with tempfile.TemporaryDirectory() as work:
        make(cases, Path(work))


if __name__ == "__main__":
    main()
