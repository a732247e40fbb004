"""Makes files with the ONNX backend of sentence-transformers: plain, optimized and quantized.

`python sentence_files.py FOLDER` writes a case for each kind, in an environment with sentence-transformers and
optimum-onnx: the file, its inputs and, where the tool does not round, hidden states and attention weights in torch.
`bench.foreign` serves and compares them. A tool that fails makes a case without a file, which states the error. A case
that FOLDER already has raises FileExistsError.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from cases import cases_of_command_line, quiet
from models import SPREAD, VOCABULARY, Answer, Arrays, answers_of, texts, word_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
PACKAGE = "sentence-transformers"


def checkpoint(folder: Path) -> Any:
    """Write a sentence-transformers folder with random weights, and return its encoder in eager attention."""
    import sentence_transformers
    from sentence_transformers.sentence_transformer import modules

    torch.manual_seed(80)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, **SPREAD,
    )  # fmt: skip
    encoder = transformers.BertModel(config).eval()
    with quiet(), tempfile.TemporaryDirectory() as plain:
        encoder.save_pretrained(plain)
        word_tokenizer().save_pretrained(plain)
        inner = modules.Transformer(plain)
        pooling = modules.Pooling(32)
        sentence_transformers.SentenceTransformer(modules=[inner, pooling], device="cpu").save(str(folder))
    return transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()


def answers(encoder: Any) -> tuple[list[Arrays], list[Arrays]]:
    """Return hidden states and weights, (H, L, S) by layer, of each sequence alone."""

    def run(batch: Mapping[str, torch.Tensor]) -> Answer:
        found = encoder(**batch, output_attentions=True)
        return found[0], found.attentions

    return answers_of(texts(), "last_hidden_state", run)


def written(source: Path, kind: str) -> Callable[[Path], Path]:
    """Return a function that writes the file: `plain`, an optimization level, or `int8`."""

    def write(place: Path) -> Path:
        import sentence_transformers
        from sentence_transformers import backend

        with quiet():
            model = sentence_transformers.SentenceTransformer(
                str(source), backend="onnx", model_kwargs={"export": True}
            )
            model.save_pretrained(str(place))
            if kind == "int8":
                backend.export_dynamic_quantized_onnx_model(model, "avx2", str(place))
            elif kind != "plain":
                backend.export_optimized_onnx_model(model, kind, str(place))
        files = sorted((place / "onnx").glob("*.onnx"), key=lambda path: path.stat().st_mtime)
        return files[-1]

    return write


def main() -> None:
    """Entry point."""
    cases = cases_of_command_line(__doc__)
    with tempfile.TemporaryDirectory() as work:
        source = Path(work)
        outputs, weights = answers(checkpoint(source))
        for kind in ("plain", "O1", "O2", "O3", "int8"):
            # O3 approximates Gelu by tanh.
            exact = kind not in {"int8", "O3"}
            cases.add(
                f"sentence-transformers, ONNX {kind}",
                PACKAGE,
                "BERT",
                written(source, kind),
                texts(),
                outputs=outputs if exact else (),
                weights=weights if exact else (),
                sites=2,
                words=True,
            )


if __name__ == "__main__":
    main()
