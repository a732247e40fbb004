"""Frozen values, the error tree and the clock port. Imports nothing of ours, and of libraries only numpy."""
