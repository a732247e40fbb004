"""Graphs in float16 and eight bits, and what that costs and brings."""
