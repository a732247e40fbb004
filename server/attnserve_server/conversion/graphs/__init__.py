"""Graphs on their way into a bundle: files read with care, copied with taps, opened for checks, written."""
