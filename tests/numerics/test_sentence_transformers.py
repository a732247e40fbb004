"""Folders of sentence-transformers and rerankers: embeddings and scores against their definition over hidden states.

The definition is that of sentence-transformers 5.7, whose own answers differ from these bundles by at most 3e-6.

`checkpoint` writes a tiny checkpoint, and `with_modules` its modules. Needs torch and transformers, and not
sentence-transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_client import AttentionSelection, Client, InvalidRequest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.check.findings import CheckRequest
from attnserve_server.conversion.check.recheck import check_bundle
from attnserve_server.conversion.convert import ExportRequest, export_bundle
from attnserve_server.conversion.sources.sentence_transformers import activation_of, modules_of, prompts_of
from head_checkpoints import checkpoint
from safetensors.numpy import save_file
from serving import serve

pytestmark = pytest.mark.torch

TOLERANCE = 1e-5
TEXTS = ("the cat sat on a mat", "a dog", "loud dogs looked at the barking cats .")
PROMPT = "the dog: "
OUT = 12
Array = np.ndarray


def write(folder: Path, name: str, content: Any) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def with_modules(folder: Path, *modules: tuple[str, dict[str, Any]]) -> Path:
    """Add modules behind the transformer of a folder, as sentence-transformers 5 writes them."""
    listed = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for at, (kind, config) in enumerate(modules, start=1):
        listed.append(
            {"idx": at, "name": str(at), "path": f"{at}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        )
        write(folder, f"{at}_{kind}/config.json", config)
    write(folder, "modules.json", listed)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by name: `all` has every way of pooling, a dense layer, normalisation and prompts."""
    work = tmp_path_factory.mktemp("sources")
    everything = with_modules(
        checkpoint(work / "all", "Bert", "ForMaskedLM"),  # trained with a head, which embedding leaves out
        (
            "Pooling",
            {"pooling_mode": ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]},
        ),
        ("Dense", {"in_features": 192, "out_features": OUT, "activation_function": "torch.nn.modules.activation.Tanh"}),
        ("Normalize", {}),
    )
    random = np.random.default_rng(0)
    weights = {"linear.weight": random.normal(0, 0.1, (OUT, 192)), "linear.bias": random.normal(0, 0.1, OUT)}
    save_file(
        {name: value.astype(np.float32) for name, value in weights.items()}, everything / "2_Dense/model.safetensors"
    )
    write(everything, "sentence_bert_config.json", {"max_seq_length": 24, "do_lower_case": False})
    prompts = {"query": PROMPT, "plain": ""}
    config = {"prompts": prompts, "default_prompt_name": "query", "similarity_fn_name": "cosine"}
    write(everything, "config_sentence_transformers.json", config)
    described = json.loads((everything / "config.json").read_text())
    write(everything, "config.json", {**described, "matryoshka_dimensions": [OUT, 4]})
    reranker = checkpoint(work / "reranker", "Bert", "ForSequenceClassification", num_labels=1)
    write(reranker, "config_sentence_transformers.json", {"activation_fn": "torch.nn.modules.linear.Identity"})
    return {"all": everything, "reranker": reranker}


@pytest.fixture(scope="module")
def client(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    repository = tmp_path_factory.mktemp("bundles")
    for name, source in folders.items():
        export_bundle(
            ExportRequest(source=str(source), name=name, repository=repository, exporter="torchscript", fuse=False)
        )
        assert check_bundle(CheckRequest(path=repository / name / "1", against=str(source))).passed
    embedding = json.loads((repository / "all" / "1" / "manifest.json").read_text())["embedding"]
    assert (embedding["normalized"], embedding["sizes"]) == (True, [4]), "the full length is no part"
    with serve(repository, tmp_path_factory.mktemp("server")) as server, Client(server.target) as opened:
        yield opened


def eager(source: Path, loader: str, *texts: str) -> Array:
    """Return hidden states (L, D), or logits, of one text or a pair alone."""
    import torch  # noqa: PLC0415 - heavy
    import transformers  # noqa: PLC0415

    tokens = transformers.AutoTokenizer.from_pretrained(source)(*texts, return_tensors="pt")
    model = getattr(transformers, loader).from_pretrained(source, attn_implementation="eager").eval()
    with torch.inference_mode():
        answer = model(**tokens)
    return (answer.last_hidden_state if loader == "AutoModel" else answer.logits)[0].numpy().astype(np.float64)


def embedding_of(source: Path, text: str) -> Array:
    """Return the embedding of a text by definition, in float64."""
    hidden = eager(source, "AutoModel", text)
    count = len(hidden)
    places = np.arange(1, count + 1)
    weighted = (hidden * places[:, None]).sum(0) / places.sum()
    pooled = [hidden[0], hidden.max(0), hidden.mean(0), hidden.sum(0) / np.sqrt(count), weighted, hidden[-1]]
    from safetensors.numpy import load_file  # noqa: PLC0415 - installed with transformers

    dense = load_file(source / "2_Dense/model.safetensors")
    made = np.tanh(np.concatenate(pooled) @ dense["linear.weight"].T.astype(np.float64) + dense["linear.bias"])
    return np.asarray(made / np.linalg.norm(made))


def test_embeddings_of_a_batch_equal_their_definition(client: Client, folders: dict[str, Path]) -> None:
    results = client.infer("all", list(TEXTS), prompt_name="")
    for text, result in zip(TEXTS, results, strict=True):
        assert list(result.outputs) == ["embedding"]
        np.testing.assert_allclose(result.outputs["embedding"], embedding_of(folders["all"], text), atol=TOLERANCE)


def test_the_default_prompt_is_put_before_the_text(client: Client, folders: dict[str, Path]) -> None:
    default = client.infer("all", TEXTS[0]).outputs["embedding"]
    np.testing.assert_allclose(default, embedding_of(folders["all"], PROMPT + TEXTS[0]), atol=TOLERANCE)
    np.testing.assert_array_equal(default, client.infer("all", TEXTS[0], prompt_name="query").outputs["embedding"])
    plain = client.infer("all", TEXTS[0], prompt_name="plain").outputs["embedding"]
    np.testing.assert_array_equal(plain, client.infer("all", TEXTS[0], prompt_name="").outputs["embedding"])


def test_spans_under_a_prompt_are_those_of_the_callers_text(client: Client) -> None:
    text = "Barking dogs sat"
    for unit, shown in (("token", ["bark", "##ing", "dog", "##s", "sat"]), ("word", ["Barking", "dogs", "sat"])):
        selection = AttentionSelection(layers=[-1], heads="mean", unit=unit)  # type: ignore[arg-type]
        (found,) = client.infer("all", text, attention=selection).attention
        own = [token for token in found.tokens if not token.special]
        assert [token.text for token in own] == shown
        assert text[own[0].start : own[-1].end] == text
        assert sum(token.special for token in found.tokens) == 5  # [CLS], the prompt's three tokens, [SEP]
        np.testing.assert_allclose(found.weights.sum(-1), 1, atol=TOLERANCE)


def test_the_description_has_prompts_length_and_similarity(client: Client) -> None:
    model = client.model("all")
    assert model.prompts == {"query": PROMPT, "plain": ""}
    assert (model.default_prompt_name, model.similarity) == ("query", "cosine")
    assert model.axes[0].max_length == 24
    assert {spec.name: spec.on_request for spec in model.outputs} == {"last_hidden_state": True, "embedding": False}
    with pytest.raises(InvalidRequest, match="25 tokens exceed 24"):
        client.infer("all", "cat " * 23, prompt_name="")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (TEXTS[0], "no prompt 'other'; the model has "),
        ({"input_ids": np.array([2, 5, 3])}, "no prompt 'other'; the model has "),
    ],
)
def test_an_unknown_prompt_is_refused(client: Client, given: Any, problem: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        client.infer("all", given, prompt_name="other")
    assert refused.value.violations[0].field == "prompt_name"
    assert refused.value.violations[0].description.startswith(problem)


def test_a_prompt_with_tensors_is_refused(client: Client) -> None:
    with pytest.raises(InvalidRequest) as refused:
        client.infer("all", {"input_ids": np.array([2, 5, 3])}, prompt_name="query")
    (violation,) = refused.value.violations
    assert violation.field == "prompt_name"
    assert violation.description == "a prompt is put before text, and sequences[0] has tensors: unset it"


def test_scores_of_pairs_equal_the_rerankers_own(client: Client, folders: dict[str, Path]) -> None:
    pairs = [(TEXTS[0], other) for other in TEXTS]
    results = client.infer("reranker", pairs, attention=AttentionSelection(layers=[-1], heads="mean"))
    for pair, result in zip(pairs, results, strict=True):
        (logit,) = eager(folders["reranker"], "AutoModelForSequenceClassification", *pair)
        assert result.labels is not None
        (label,) = result.labels.labels
        assert label.score == pytest.approx(logit, abs=TOLERANCE)  # its files state Identity
        assert {token.segment for token in result.attention[0].tokens} == {0, 1}


def test_modules_of_older_files_are_read(tmp_path: Path) -> None:
    folder = with_modules(
        tmp_path,
        (
            "Pooling",
            {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
        ),
        ("Dropout", {}),
        ("Normalize", {}),
    )
    assert str(modules_of(folder)) == "max + mean, normalized"
    write(folder, "config.json", {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"})
    assert activation_of(folder) == "sigmoid"


def test_a_folder_of_a_transformer_alone_has_no_modules(tmp_path: Path) -> None:
    assert modules_of(tmp_path) is None
    assert modules_of(with_modules(tmp_path)) is None
    assert activation_of(tmp_path) is None


@pytest.mark.parametrize(
    ("modules", "problem"),
    [
        ([("Pooling", {"pooling_mode": "median"})], "1_Pooling pools by 'median'"),
        ([("Pooling", {}), ("LSTM", {})], "modules.json has the module LSTM at '2_LSTM'"),
        ([("Pooling", {}), ("Dense", {"activation_function": "mine.Swish"})], "2_Dense has the activation mine.Swish"),
        (
            [("Pooling", {}), ("Dense", {"module_input_name": "token_embeddings"})],
            "2_Dense is not a layer of the embedding",
        ),
        ([("Pooling", {}), ("Dense", {})], "2_Dense has no model.safetensors"),
    ],
)
def test_a_module_that_is_not_supported_is_refused(
    modules: list[tuple[str, dict[str, Any]]], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(BuildRefused, match=problem):
        modules_of(with_modules(tmp_path, *modules))


def test_prompts_that_pooling_leaves_out_are_refused(tmp_path: Path) -> None:
    folder = with_modules(tmp_path, ("Pooling", {"include_prompt": False}))
    assert prompts_of(folder).texts == {}
    write(folder, "config_sentence_transformers.json", {"prompts": {"query": "q: "}})
    with pytest.raises(BuildRefused, match="the pooling leaves out the tokens of prompts"):
        prompts_of(folder)


def test_lower_case_that_the_tokenizer_does_not_give_is_refused(tmp_path: Path) -> None:
    folder = with_modules(tmp_path, ("Pooling", {}))
    write(folder, "sentence_bert_config.json", {"do_lower_case": True})
    write(folder, "tokenizer.json", {"normalizer": {"type": "BertNormalizer", "lowercase": True}})
    assert modules_of(folder) is not None
    write(folder, "tokenizer.json", {"normalizer": None})
    with pytest.raises(BuildRefused, match="add a normalizer 'Lowercase'"):
        modules_of(folder)
