"""Read ONNX files with care, walk graphs, and write new nodes into them. Knows nothing of attention; runs nothing."""
