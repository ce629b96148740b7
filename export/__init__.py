"""Exporters: PIFA models in formats of other runtimes."""

from .onnx_export import OnnxExport as OnnxExport
from .onnx_export import to_onnx as to_onnx
