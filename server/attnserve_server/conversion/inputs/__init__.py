"""Read the inputs of a graph: types, roles, axes, ranges, masks, and how text fills them. Runs nothing."""
