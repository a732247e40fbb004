"""Write three tiny checkpoints with random weights, in the form of published ones: classifier, reranker and embedder.

They show how a folder is converted and served without a download. Their labels and embeddings mean nothing.
Needs torch and transformers. A folder that cannot be written raises OSError.

    python examples/tiny_checkpoints.py checkpoints
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'"
WORDS = ("the", "a", "film", "is", "who", "buyer", "seller", "pays", "wonder", "##ful", "all", "good", "##s")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SIZES |= {"initializer_range": 0.2}  # far from 0, so that attention is uneven
SENTIMENTS = {0: "negative", 1: "neutral", 2: "positive"}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer with a few words and all letters, lower-cased, as BERT has."""
    pieces = [*SPECIAL.values(), *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    made = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(list(SPECIAL.values()))
    cls, sep = (made.token_to_id(SPECIAL[name]) for name in ("cls_token", "sep_token"))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=128, **SPECIAL)


def save(folder: Path, kind: str, **options: Any) -> None:
    """Write a BERT with random weights and its tokenizer."""
    torch.manual_seed(0)
    words = tokenizer()
    config = transformers.BertConfig(vocab_size=len(words), pad_token_id=words.pad_token_id, **SIZES, **options)
    getattr(transformers, kind)(config).save_pretrained(folder)
    words.save_pretrained(folder)


def write(path: Path, content: Any) -> None:
    """Write a JSON file and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def main(folder: Path) -> None:
    """Write the three folders."""
    save(folder / "classifier", "BertForSequenceClassification", id2label=SENTIMENTS)
    save(folder / "reranker", "BertForSequenceClassification", num_labels=1)
    write(
        folder / "reranker/config_sentence_transformers.json", {"activation_fn": "torch.nn.modules.activation.Sigmoid"}
    )
    save(folder / "embedder", "BertModel")
    kinds = ("Transformer", "Pooling", "Normalize")
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    write(folder / "embedder/modules.json", modules)
    write(folder / "embedder/1_Pooling/config.json", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
    prompts = {"query": "query: ", "document": ""}
    write(folder / "embedder/config_sentence_transformers.json", {"prompts": prompts, "similarity_fn_name": "cosine"})
    print(f"wrote classifier, reranker and embedder into {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder for the three checkpoints")
    main(parser.parse_args().folder)
