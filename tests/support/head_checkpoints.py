"""Tiny checkpoints with a head, random weights and a tokenizer, as folders that `export` and transformers read.

`checkpoint` and `write_tokenizer` import torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

PIECES = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "dog",
    "look",
    "bark",
    "##ed",
    "##s",
    "##ing",
    "lou",
    "##d",
    "##ly",
    ".",
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = (*SPECIAL, *PIECES)

_SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES |= {"intermediate_size": 37, "max_position_embeddings": 66, "pad_token_id": 0}
CONFIGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Bert": ("BertConfig", _SIZES),
    "Roberta": ("RobertaConfig", {**_SIZES, "type_vocab_size": 1}),
    "XLMRoberta": ("XLMRobertaConfig", {**_SIZES, "type_vocab_size": 1}),
    "DistilBert": (
        "DistilBertConfig",
        {"vocab_size": 40, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37, "max_position_embeddings": 66},
    ),
    "DebertaV2": (
        "DebertaV2Config",
        {**_SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    ),
    "GPT2": ("GPT2Config", {**_SIZES, "n_positions": 64}),
    "ModernBert": ("ModernBertConfig", {**_SIZES, "local_attention": 8, "cls_token_id": 2, "sep_token_id": 3}),
    "Longformer": ("LongformerConfig", {**_SIZES, "attention_window": [4, 8], "type_vocab_size": 1}),
    "Bart": (
        "BartConfig",
        {"vocab_size": 40, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 37}
        | {
            "decoder_ffn_dim": 37,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
}


def checkpoint(folder: Path, family: str, head: str, **changes: Any) -> Path:
    """Write a model of a family with a head, such as `Bert` and `ForSequenceClassification`, and its tokenizer.

    Args:
        folder: where both are written.
        family: a key of `CONFIGS`; any other raises KeyError.
        head: the end of a class name of transformers; AttributeError if the family has no such class.
        changes: fields of the configuration that replace those of `CONFIGS`.
    """
    import torch  # noqa: PLC0415 - heavy
    import transformers  # noqa: PLC0415
    from attnserve_server.conversion.sources.torch_export import quiet  # noqa: PLC0415 - as above

    config_class, sizes = CONFIGS[family]
    with quiet():
        torch.manual_seed(0)
        transformers.logging.disable_progress_bar()
        config = getattr(transformers, config_class)(**{**sizes, **changes})
        model = getattr(transformers, family + head)(config)
        # Initial weights are so small that attention and scores are almost uniform; larger ones make them uneven.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.3)
        model.save_pretrained(folder)
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a WordPiece tokenizer into a model folder, in the form of transformers."""
    import transformers  # noqa: PLC0415 - heavy

    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer(), model_max_length=64, **named)
    fast.save_pretrained(folder)


def tokenizer() -> Tokenizer:
    """Lower-cased words, cut into pieces, between [CLS] and [SEP]."""
    numbers = {piece: number for number, piece in enumerate(VOCABULARY)}
    made = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(list(SPECIAL))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made
