"""Finds which key each column of a windowed site's weights is, by sending the numbers of positions through the graph.

`anchors` finds the values that are still sequences, `apart` distinguishes windows from heads, and `study` reads which
query each row is and which key each column, and fits a band to it.
"""
