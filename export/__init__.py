"""Exporters: PIFA models in formats of other runtimes."""
