"""Compares a graph with its source, its weights with what they weigh, and a bundle with what it was."""
