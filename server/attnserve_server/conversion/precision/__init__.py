"""Reduce a graph to float16 or int8, and measure what that costs in accuracy and gains in speed."""
