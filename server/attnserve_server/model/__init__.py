"""Bundles on disk: manifest, repository, tokenizer."""
