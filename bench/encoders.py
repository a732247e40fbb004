"""Random encoders of known sizes, for machines without access to checkpoints: `python -m bench.encoders large FOLDER`.

The folder is one that `attnserve-server export` takes. Values do not change the cost of a run, so all layers hold the
same ones, cut from one short draw. Such a folder, and the bundle made of it, compresses to a few megabytes. Needs torch
and transformers. An unknown size ends the command with exit code 2, and raises KeyError in `encoder`; a folder that
cannot be made raises OSError.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import numpy as np
import torch
from attnserve_server.domain.values import Array
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

SIZES: Final = {
    "minilm": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "large": {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096},
}
"""The sizes of all-MiniLM-L6-v2 and of BERT-large (Devlin et al., 2018, section 3)."""
DRAWN: Final = 1 << 20
"""The number of drawn values."""
SCALE: Final = 0.02
"""The standard deviation of BERT's initialisation."""


def filled(shape: torch.Size, draw: Array) -> torch.Tensor:
    """Return a tensor filled with the draw, repeated."""
    return torch.tensor(np.resize(draw, tuple(shape)))


def encoder(size: str) -> BertModel:
    """Return the model with drawn values. Normalisations keep their initial values, one and zero."""
    model = BertModel(BertConfig(**SIZES[size]), add_pooling_layer=False).eval()  # type: ignore[arg-type]
    draw = np.random.default_rng(0).normal(0.0, SCALE, DRAWN).astype(np.float32)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "LayerNorm" not in name:
                values.copy_(filled(values.shape, draw))
    return model


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    model = encoder(options.size)
    model.save_pretrained(options.folder)
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{number}": number for number in range(2, model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(options.folder)


if __name__ == "__main__":
    main()
