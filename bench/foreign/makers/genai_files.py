"""Makes files with the model builder of onnxruntime-genai: decoders whose attention is one operator with a cache.

`python genai_files.py FOLDER` writes a case for each model and precision, in an environment with onnxruntime-genai,
torch and transformers. A case is the file, its inputs and, in fp32, the logits and attention weights in torch;
`bench.foreign` serves and compares them. A build that fails makes a case without a file, which states the error. A case
that FOLDER already has raises FileExistsError.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from cases import cases_of_command_line, quiet
from models import SPREAD, VOCABULARY, Answer, Arrays, answers_of, texts, word_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
PACKAGE = "onnxruntime-genai"
BUILD_LIMIT_S = 600
WIDTH = 64
_SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 0, **SPREAD,
}  # fmt: skip
CONFIGS = {
    "Llama": lambda: transformers.LlamaConfig(**_SHAPE),
    "Qwen2": lambda: transformers.Qwen2Config(**_SHAPE),
    "Qwen3": lambda: transformers.Qwen3Config(**_SHAPE, head_dim=16),
    "Phi-3": lambda: transformers.Phi3Config(**_SHAPE, original_max_position_embeddings=64),
    "Gemma 2": lambda: transformers.Gemma2Config(**_SHAPE, head_dim=16, sliding_window=8),
}
"""Configurations by model."""


def checkpoint(name: str, folder: Path) -> Any:
    """Write a checkpoint with random weights and a tokenizer, and return the model in eager attention."""
    torch.manual_seed(40)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    with quiet():
        model.save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
    return model


def answers(model: Any) -> tuple[list[Arrays], list[Arrays]]:
    """Return logits and weights, (H, L, S) by layer, of each sequence alone."""

    def run(batch: Mapping[str, torch.Tensor]) -> Answer:
        found = model(**batch, output_attentions=True, use_cache=False)
        return found.logits, found.attentions

    return answers_of(texts(), "logits", run)


def built(source: Path, place: Path, precision: str) -> Path:
    """Run the builder on a checkpoint. Raises RuntimeError with the last line of its log."""
    line = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(place)]
    line += ["-p", precision, "-e", "cpu", "-c", str(place / "cache")]
    line += ["--extra_options", "int4_block_size=16"] if precision == "int4" else []
    done = subprocess.run(line, capture_output=True, text=True, timeout=BUILD_LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return place / "model.onnx"


def main() -> None:
    """Entry point."""
    cases = cases_of_command_line(__doc__)
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as work:
            source = Path(work)
            outputs, weights = answers(checkpoint(name, source))
            for precision in ("fp32", "int4"):
                exact = precision == "fp32"
                cases.add(
                    f"onnxruntime-genai builder {precision}",
                    PACKAGE,
                    name,
                    lambda place, s=source, p=precision: built(s, place, p),
                    texts(),
                    outputs=outputs if exact else (),
                    weights=weights if exact else (),
                    sites=len(weights[0]),
                    # findings/transformers_replaced_tokenizer.sh: a Qwen2 folder gets another tokenizer.
                    words=name != "Qwen2",
                )


if __name__ == "__main__":
    main()
