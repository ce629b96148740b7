"""Benchmarks: speed of layers, models and ONNX files, and quality of methods side by side."""
