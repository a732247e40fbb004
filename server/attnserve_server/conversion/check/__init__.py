"""Repeat the check of an existing bundle."""
