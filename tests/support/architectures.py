"""Architectures of Hugging Face at tiny size with random weights, as folders that `export` reads.

`tiny_source` imports torch and transformers. Reading `TINY` does not need them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Tiny:
    """A tiny model. `config`: the class of its configuration; `sites`: the number of its attention sites."""

    config: str
    sizes: Mapping[str, Any]
    sites: int
    more: Mapping[str, Any] = field(default_factory=dict)


_TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT |= {"intermediate_size": 37, "max_position_embeddings": 66}
_BART = {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
_BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "max_position_embeddings": 64}
_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
_VISION |= {"image_size": 24, "patch_size": 8}
_ROPE = {**_TEXT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

TINY: Mapping[str, Tiny] = {
    "BERT": Tiny("BertConfig", _TEXT, 2),
    "RoBERTa": Tiny("RobertaConfig", {**_TEXT, "pad_token_id": 1, "type_vocab_size": 1}, 2),
    "XLM-R": Tiny("XLMRobertaConfig", {**_TEXT, "pad_token_id": 1, "type_vocab_size": 1}, 2),
    "DistilBERT": Tiny(
        "DistilBertConfig",
        {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37, "max_position_embeddings": 64},
        2,
    ),
    "ALBERT": Tiny("AlbertConfig", {**_TEXT, "embedding_size": 16}, 2),
    "ELECTRA": Tiny("ElectraConfig", {**_TEXT, "embedding_size": 16}, 2),
    "MPNet": Tiny("MPNetConfig", _TEXT, 2),
    "DeBERTa": Tiny(
        "DebertaV2Config",
        {
            **_TEXT,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 8,
            "share_att_key": True,
        },
        2,
    ),
    "ModernBERT": Tiny(
        "ModernBertConfig",
        {
            **_TEXT,
            "num_hidden_layers": 3,
            "local_attention": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        3,
    ),
    "Longformer": Tiny(
        "LongformerConfig", {**_TEXT, "attention_window": [4, 8], "pad_token_id": 1, "type_vocab_size": 1}, 2
    ),
    "GPT-2": Tiny("GPT2Config", {**_TEXT, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 1}, 2),
    "LLaMA": Tiny("LlamaConfig", _ROPE, 2),
    "BART": Tiny("BartConfig", _BART, 6),
    "T5": Tiny(
        "T5Config",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4},
        6,
    ),
    "ViT": Tiny("ViTConfig", _VISION, 2),
    "Swin": Tiny(
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        4,
    ),
    "CLIP": Tiny(
        "CLIPConfig",
        {
            "text_config": {
                **_TEXT,
                "projection_dim": 24,
                "max_position_embeddings": 64,
                "eos_token_id": 98,
                "bos_token_id": 97,
                "pad_token_id": 1,
            },
            "vision_config": {**_VISION, "projection_dim": 24},
            "projection_dim": 24,
        },
        4,
    ),
    "Whisper": Tiny(
        "WhisperConfig",
        {
            **_BART,
            "num_mel_bins": 8,
            "max_source_positions": 12,
            "max_target_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        6,
    ),
}


def tiny_source(folder: Path, name: str, **changes: Any) -> Path:
    """Write a model folder with random weights, which depend on the name and the changes only.

    Args:
        folder: where the model's configuration and weights are written.
        name: a key of `TINY`; any other raises KeyError.
        changes: fields of the configuration that replace those of `TINY`.
    """
    import torch  # noqa: PLC0415 - heavy
    import transformers  # noqa: PLC0415
    from attnserve_server.conversion.sources.torch_export import quiet  # noqa: PLC0415 - as above

    tiny = TINY[name]
    with quiet():
        torch.manual_seed(0)
        config = getattr(transformers, tiny.config)(**{**tiny.sizes, **changes})
        transformers.logging.disable_progress_bar()
        model = transformers.AutoModel.from_config(config)
        # Initial weights are so small that attention is almost uniform; larger ones make it uneven.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.15)
        model.save_pretrained(folder)
    return folder
