#!/usr/bin/env bash
# transformers replaces the tokenizer of a folder by another kind, silently, if config.json names the model type qwen2.
#
# Versions: transformers 5.23.0, tokenizers 0.23.3 (no torch).
# Source: AutoTokenizer, https://huggingface.co/docs/transformers/main/model_doc/auto#transformers.AutoTokenizer
# Expected by most: AutoTokenizer loads the tokenizer.json of a folder, whose model and pre-tokenizer it states, and
# tokenizer_config.json names the class. config.json describes the network.
# Observed: with `"model_type": "qwen2"` beside them, AutoTokenizer takes the vocabulary alone and builds a byte-level BPE
# of it. A text that the tokenizer.json splits into known words gives no token at all. With `llama` or `qwen3` in the same
# place, the same two files give the right ids. Tools that copy a tokenizer by loading and saving it, such as model
# builders, write the replaced one beside the model.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
cd "$work"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PYTHON'
import tokenizers
import transformers

words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{n}": n for n in range(60)}, "w0"))
words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w1", unk_token="w0")
made.save_pretrained("folder")


def ids(config):
    """Return the class and the ids of a text, with this configuration beside the tokenizer."""
    config(vocab_size=60).save_pretrained("folder")
    loaded = transformers.AutoTokenizer.from_pretrained("folder")
    return type(loaded).__name__, loaded("w3 w4")["input_ids"]


for config in (transformers.LlamaConfig, transformers.Qwen3Config):
    kind, found = ids(config)
    print(f"{config.__name__}: {kind} {found}")
    assert found == [3, 4], "the control: another model type"
kind, found = ids(transformers.Qwen2Config)
print(f"Qwen2Config: {kind} {found}")
if found == [3, 4]:
    raise SystemExit("the folder's own tokenizer is loaded: the behaviour is no longer there")
PYTHON
