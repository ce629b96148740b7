"""Hugging Face models and texts: loading, calibration windows, perplexity, generation."""
