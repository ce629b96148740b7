"""Exporters: PIFA models in formats of other runtimes."""

from .onnx_export import OnnxExport as OnnxExport
from .onnx_export import to_onnx as to_onnx
from .onnx_session import NativeRecord as NativeRecord
from .onnx_session import session as session
from .genai_config import write_genai_config as write_genai_config
from .onnx_rewrite import OnnxRewrite as OnnxRewrite
from .onnx_rewrite import rewrite_onnx as rewrite_onnx
