"""Exporters: PIFA models in formats of other runtimes."""

from .genai_config import write_genai_config as write_genai_config
from .native_scatter import build as build_native
from .onnx_export import OnnxExport as OnnxExport
from .onnx_export import check_export as check_export
from .onnx_export import to_onnx as to_onnx
from .onnx_generate import generate_greedily as generate_greedily
from .onnx_rewrite import OnnxRewrite as OnnxRewrite
from .onnx_rewrite import rewrite_onnx as rewrite_onnx
from .onnx_session import NativeRecord as NativeRecord
from .onnx_session import session as session

__all__ = [
    "NativeRecord",
    "OnnxExport",
    "OnnxRewrite",
    "build_native",
    "check_export",
    "generate_greedily",
    "rewrite_onnx",
    "session",
    "to_onnx",
    "write_genai_config",
]
