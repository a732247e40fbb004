"""Sources of a conversion: torch models and ONNX files. Only this package imports torch."""
