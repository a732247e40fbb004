"""Bundles: the manifest and its parts, the repository, the tokenizer."""
