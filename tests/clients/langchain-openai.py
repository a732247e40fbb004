"""LangChain's embeddings over OpenAI's API, with texts: its default is token ids of another tokenizer."""

from __future__ import annotations

import argparse

from langchain_openai import OpenAIEmbeddings


def main() -> None:
    """Check all of it. Raises AssertionError."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rest", type=int, required=True)
    address = f"http://127.0.0.1:{parser.parse_known_args()[0].rest}/v1"
    given = {"base_url": address, "api_key": "none", "model": "tiny", "max_retries": 0}
    embedder = OpenAIEmbeddings(**given, check_embedding_ctx_length=False)  # type: ignore[arg-type]
    found = embedder.embed_documents(["the cat sat", "a dog looked"])
    assert [len(one) for one in found] == [8, 8]
    assert len(embedder.embed_query("the cat sat")) == 8
    print("langchain-openai: documents and a query, with check_embedding_ctx_length=False")


main()
