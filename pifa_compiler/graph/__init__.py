"""Captured graphs: how a model becomes one, and how one is run."""
